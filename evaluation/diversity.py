"""Continue prompts under different actions and say how different the continuations are.

    python evaluation/diversity.py --model runs/demo/hf --data runs/demo/data --output diversity.json

Five ways to get several continuations of one prompt: one fixed action each, held for the whole text; the
same for the first token only, then the policy; an action drawn uniformly at every token; actions sampled
from the policy; tokens sampled from the frozen base (the usual way, for comparison). In all but the last
the token is always the likeliest one, so all variety comes from the actions. (The paper, section 4.1,
asks the same with sentence embeddings; self-BLEU and distinct-n answer it without another model.) Prints
the figures and writes them with the texts as JSON.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from data_prep.blended_data import open_blend
from data_prep.errors import run_cli
from data_prep.output_files import write_json_whole
from evaluation.checks import output_problems, raise_problems
from evaluation.continuations import (
    Prompt,
    base_samples,
    first_actions,
    fixed_actions,
    policy_actions,
    random_actions,
)
from evaluation.diversity_figures import DiversityFigures, diversity
from evaluation.held_out_blocks import check_fit, document_prompts
from evaluation.huggingface_model import ExportedModel, decode, load_exported_model

MODE_TITLES = {
    "fixed_actions": "One fixed action at every token",
    "first_actions": "One fixed action first, then the policy's likeliest",
    "random_actions": "A random action at every token",
    "policy_actions": "Actions sampled from the policy",
    "base_tokens": "Tokens sampled from the base",
}


@dataclass(frozen=True, kw_only=True)
class ContinuationSettings:
    """How prompts are continued."""

    prompts_per_source: int = 2
    """Held-out documents of each source whose beginning is a prompt."""
    prompt_tokens: int = 24
    """Tokens of a prompt."""
    new_tokens: int = 40
    """Tokens of a continuation; all have this length, since distinct-n falls with length."""
    continuations: int = 8
    """Continuations of a prompt in each mode; as many fixed actions are tried."""
    seed: int = 0
    """Draws random actions, policy actions and base tokens."""


@dataclass(frozen=True, kw_only=True)
class DiversityConfig(ContinuationSettings):
    """Continue held-out prompts under different actions."""

    model: Path
    """Folder written by megatron_to_hf.py."""
    data: Path
    """Blended data folder (with blend.json), for its validation shards."""
    output: Path
    """JSON file to write."""
    actions: tuple[int, ...] = ()
    """Fixed actions to try; by default --continuations of them, evenly spaced."""
    overwrite: bool = False
    """Replace an output file that exists."""


@dataclass(frozen=True, kw_only=True)
class ModeResult:
    """All continuations of one mode."""

    name: str
    """What was varied; `MODE_TITLES` says it for people."""
    labels: list[str]
    """Name of each continuation of a prompt: "action 17" or "sample 2"."""
    texts: list[list[str]]
    """Texts of the continuations, [prompt][continuation]."""
    figures: DiversityFigures
    """Diversity over the continuations of a prompt, averaged over prompts."""


@dataclass(frozen=True, kw_only=True)
class DiversityResult:
    """Prompts and their continuations in every mode."""

    prompts: list[Prompt]
    modes: list[ModeResult]


def settings_problems(
    settings: ContinuationSettings, actions: Sequence[int], exported: ExportedModel
) -> list[str]:
    """What is wrong with the settings for this model, in words for the user."""
    config = exported.model.config
    problems = [
        f"--{name.replace('_', '-')} {getattr(settings, name)}: must be at least {least}"
        for name, least in (
            ("prompts_per_source", 1),
            ("prompt_tokens", 1),
            ("new_tokens", 4),
            ("continuations", 2),
        )
        if getattr(settings, name) < least
    ]
    if len(actions) == 1 or any(not 0 <= action < config.num_actions for action in actions):
        problems.append(
            f"--actions {' '.join(map(str, actions))}: give at least 2, from 0 to {config.num_actions - 1}"
        )
    if settings.continuations > config.num_actions:
        problems.append(
            f"--continuations {settings.continuations}: the model has {config.num_actions} actions"
        )
    return problems


def spaced_actions(count: int, num_actions: int) -> list[int]:
    """`count` different actions spread evenly over the codebook."""
    return [index * num_actions // count for index in range(count)]


def compare_modes(
    exported: ExportedModel, prompts: list[Prompt], actions: Sequence[int], settings: ContinuationSettings
) -> DiversityResult:
    """Continue every prompt in every mode; the same seed gives the same texts."""
    model, new_tokens, count = exported.model, settings.new_tokens, settings.continuations
    prompts_PS = torch.tensor([prompt.tokens for prompt in prompts], device=model.device)
    by_action = [f"action {action}" for action in actions]
    samples = [f"sample {index + 1}" for index in range(count)]
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        runs = [
            ("fixed_actions", by_action, fixed_actions(model, prompts_PS, actions, new_tokens)),
            ("first_actions", by_action, first_actions(model, prompts_PS, actions, new_tokens)),
            ("random_actions", samples, random_actions(model, prompts_PS, count, new_tokens)),
            ("policy_actions", samples, policy_actions(model, prompts_PS, count, new_tokens)),
            ("base_tokens", samples, base_samples(model, prompts_PS, count, new_tokens)),
        ]
    modes = [
        ModeResult(
            name=name,
            labels=labels,
            texts=[
                [decode(exported.tokenizer, ids) for ids in one_prompt] for one_prompt in tokens_PMS.tolist()
            ],
            figures=diversity(tokens_PMS.tolist()),
        )
        for name, labels, tokens_PMS in runs
    ]
    return DiversityResult(prompts=prompts, modes=modes)


def diversity_table(result: DiversityResult) -> Table:
    """The figures of every mode for the terminal."""
    table = Table(
        title=f"Diversity of {len(result.modes[0].labels)} continuations of {len(result.prompts)} prompts"
    )
    for column in ("mode", "self-BLEU (low = varied)", "distinct-1", "distinct-2"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode in result.modes:
        figures = mode.figures
        table.add_row(
            MODE_TITLES[mode.name],
            f"{figures.self_bleu:.3f}",
            f"{figures.distinct_1:.3f}",
            f"{figures.distinct_2:.3f}",
        )
    return table


def run(config: DiversityConfig) -> DiversityResult:
    """Continue the prompts, write `config.output`, return the result."""
    raise_problems(output_problems(config.output, config.overwrite))
    data = open_blend(config.data)
    exported = load_exported_model(config.model)
    check_fit(data, exported, config.prompt_tokens + config.new_tokens)
    raise_problems(settings_problems(config, config.actions, exported))
    prompts = document_prompts(data, exported.tokenizer, config.prompt_tokens, config.prompts_per_source)
    actions = config.actions or spaced_actions(config.continuations, exported.model.config.num_actions)
    result = compare_modes(exported, prompts, actions, config)
    write_json_whole(config.output, {**asdict(result), "model": str(config.model), "data": str(config.data)})
    return result


def main() -> None:
    """Command line."""
    config = tyro.cli(DiversityConfig, description=__doc__)
    result = run(config)
    console = Console()
    console.print(diversity_table(result))
    console.print(f"written to {config.output}")


if __name__ == "__main__":
    run_cli(main)
