"""The held-out table of an exported model: next-token losses, actions in use, divergence, policy accuracy.

    python evaluation/held_out.py --model runs/demo/hf --data runs/demo/data --output runs/demo/held_out.json

Reads the validation shards of a blended data folder, takes blocks of each source in proportion to the
blend's weights, prints the table and writes the same figures as JSON.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from data_prep.blended_data import open_blend
from data_prep.errors import run_cli
from data_prep.output_files import write_json_whole
from evaluation.checks import output_problems, raise_problems
from evaluation.held_out_blocks import DEFAULT_SEQUENCE_LENGTH, check_fit, held_out_blocks
from evaluation.held_out_figures import HeldOutFigures, measure
from evaluation.huggingface_model import load_exported_model

DEFAULT_TOKENS = 8192
DEFAULT_CHUNK_GIB = 0.008  # small enough to stay in the processor's caches, which is where a CPU is quick


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Measure an exported model on held-out blocks."""

    model: Path
    """Folder written by megatron_to_hf.py."""
    data: Path
    """Blended data folder (with blend.json), for its validation shards."""
    output: Path
    """JSON file to write."""
    tokens: int = DEFAULT_TOKENS
    """Held-out tokens over all sources; rounded down to whole blocks, at least one block a source."""
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH
    """Tokens in a block; best the length that the model was trained with."""
    chunk_gib: float = DEFAULT_CHUNK_GIB
    """Logits held in memory at once, in GiB."""
    seed: int = 0
    """Draws the random actions."""
    overwrite: bool = False
    """Replace an output file that exists."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One thing a trained model should reach."""

    what: str
    measured: str
    wanted: str
    reached: bool


def targets(figures: HeldOutFigures) -> list[Target]:
    """Compare the figures with what a useful CoLA model shows, each relative to the model's own base."""
    ratio = figures.idm_loss / figures.base_loss
    change = figures.mixture_loss / figures.base_loss - 1
    chance = math.log(figures.num_actions)
    return [
        Target(
            what="IDM-action loss against base loss",
            measured=f"{ratio:.2f} x",
            wanted="at most 0.6 x",
            reached=figures.idm_loss <= 0.6 * figures.base_loss,
        ),
        Target(
            what="Actions in use",
            measured=f"{figures.alive_actions} of {figures.num_actions}",
            wanted="all of them",
            reached=figures.alive_actions == figures.num_actions,
        ),
        Target(
            what="Policy's action loss",
            measured=f"{figures.policy_action_loss:.2f}",
            wanted=f"below chance, {chance:.2f}",
            reached=figures.policy_action_loss < chance,
        ),
        Target(
            what="Policy-mixture loss against base loss",
            measured=f"{change:+.1%}",
            wanted="at most +2 %",
            reached=figures.mixture_loss <= 1.02 * figures.base_loss,
        ),
        Target(
            what="Accuracy, greedy action + token",
            measured=f"{figures.greedy_accuracy:.1%}",
            wanted=f"at least the base's, {figures.base_accuracy:.1%}",
            reached=figures.greedy_accuracy >= figures.base_accuracy,
        ),
    ]


def held_out_table(figures: HeldOutFigures) -> Table:
    """The headline table for the terminal."""
    table = Table(title=f"Held-out, {figures.tokens:,} tokens in blocks of {figures.sequence_length_tokens}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("against base", justify="right")
    for label, loss in headline_losses(figures):
        table.add_row(label, f"{loss:.3f}", f"{loss / figures.base_loss:.2f} x")
    table.add_section()
    for label, value in (
        ("actions in use", f"{figures.alive_actions} of {figures.num_actions}"),
        ("action perplexity", f"{figures.action_perplexity:.1f}"),
        ("KL(mixture || base)", f"{figures.kl_mixture_base:.3f}"),
        ("KL(base || mixture)", f"{figures.kl_base_mixture:.3f}"),
        ("policy action loss", f"{figures.policy_action_loss:.3f}"),
        ("policy action accuracy", f"{figures.policy_action_accuracy:.1%}"),
        ("next-token accuracy, greedy action + token", f"{figures.greedy_accuracy:.1%}"),
        ("next-token accuracy, base", f"{figures.base_accuracy:.1%}"),
    ):
        table.add_row(label, value, "")
    table.add_section()
    for source, losses in figures.per_source.items():
        table.add_row(
            f"IDM-action loss, {source}",
            f"{losses.idm_loss:.3f}",
            f"{losses.idm_loss / losses.base_loss:.2f} x",
        )
    return table


def headline_losses(figures: HeldOutFigures) -> list[tuple[str, float]]:
    """The next-token losses with the labels used in every table."""
    return [
        ("loss, base", figures.base_loss),
        ("loss, IDM actions", figures.idm_loss),
        ("loss, policy mixture", figures.mixture_loss),
        ("loss, greedy policy action", figures.greedy_loss),
        ("loss, random actions", figures.random_loss),
    ]


def check(config: HeldOutConfig) -> None:
    """All problems of the flags in one `UserError`."""
    problems = output_problems(config.output, config.overwrite)
    if config.tokens < 1:
        problems.append(f"--tokens {config.tokens}: must be at least 1")
    if config.sequence_length < 2:
        problems.append(f"--sequence-length {config.sequence_length}: must be at least 2")
    if config.chunk_gib <= 0:
        problems.append(f"--chunk-gib {config.chunk_gib}: must be above 0")
    raise_problems(problems)


def run(config: HeldOutConfig) -> HeldOutFigures:
    """Measure, write `config.output`, return the figures."""
    check(config)
    data = open_blend(config.data)
    exported = load_exported_model(config.model)
    check_fit(data, exported, config.sequence_length)
    blocks = held_out_blocks(data, sequence_length=config.sequence_length, tokens=config.tokens)
    started = time.perf_counter()
    figures = measure(exported.model, blocks, chunk_gib=config.chunk_gib, seed=config.seed)
    measuring_seconds = time.perf_counter() - started
    facts = {"model": str(config.model), "data": str(config.data), "seed": config.seed}
    write_json_whole(
        config.output, {**asdict(figures), **facts, "measuring_seconds": round(measuring_seconds, 2)}
    )
    return figures


def main() -> None:
    """Command line."""
    config = tyro.cli(HeldOutConfig, description=__doc__)
    figures = run(config)
    console = Console()
    console.print(held_out_table(figures))
    console.print(f"written to {config.output}")


if __name__ == "__main__":
    run_cli(main)
