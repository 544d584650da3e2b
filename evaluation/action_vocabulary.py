"""What each latent action says: the tokens it makes likely, and how often the IDM uses it.

    python evaluation/action_vocabulary.py --model runs/demo/hf --data runs/demo/data --output vocabulary.json

For action k, P_k(v) is the world model's probability of token v under k, averaged over held-out positions
with the policy's probability of k as weight (so an action is heard where it would be chosen, not where it
makes no sense). Tokens are ranked by P_k(v) * log(P_k(v) / P(v)), where P is the mean of P_k over the
actions: their part in the divergence of the action from the average. Ranked by probability alone every
action would list the same frequent tokens; by the ratio alone, rare tokens that it never really says.
Prints the list and writes it as JSON.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from data_prep.blended_data import open_blend
from data_prep.errors import run_cli
from data_prep.output_files import write_json_whole
from data_prep.progress import progress_bar
from evaluation.checks import output_problems, raise_problems
from evaluation.held_out_blocks import DEFAULT_SEQUENCE_LENGTH, check_fit, held_out_blocks
from evaluation.huggingface_model import ColaScorer, decode, load_exported_model

# B blocks, S sequence, V vocabulary, A actions. C = S-1: the positions that have a next token.

SPACE, NEWLINE, TAB = "\u00b7", "\u21b5", "\u21e5"  # how a space, a line end and a tab are shown
DEFAULT_TOKENS = 2048
DEFAULT_TOP = 10
BATCH_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class ActionVocabularyConfig:
    """List the tokens that each action makes likely."""

    model: Path
    """Folder written by megatron_to_hf.py."""
    data: Path
    """Blended data folder (with blend.json), for its validation shards."""
    output: Path
    """JSON file to write."""
    tokens: int = DEFAULT_TOKENS
    """Held-out tokens to average over; the world model runs once for each action over all of them."""
    top: int = DEFAULT_TOP
    """Tokens listed for an action."""
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH
    """Tokens in a block; best the length that the model was trained with."""
    overwrite: bool = False
    """Replace an output file that exists."""


@dataclass(frozen=True, kw_only=True)
class ActionToken:
    """A token that an action makes likely."""

    text: str
    """The token with its white space made visible."""
    probability: float
    """P_k(v), 0 to 1."""
    lift: float
    """P_k(v) / P(v): how many times likelier than under the average action."""


@dataclass(frozen=True, kw_only=True)
class ActionEntry:
    """One action of the codebook."""

    action: int
    usage: float
    """Share of held-out positions where the IDM reads this action, 0 to 1."""
    tokens: list[ActionToken]
    """Most telling first."""


@torch.no_grad()
def action_token_probs(model: ColaScorer, tokens_NS: torch.Tensor, *, progress: bool = True) -> torch.Tensor:
    """P_k(v) over the positions t <= S-2 of the blocks, as float64 [A, V]; each row sums to 1."""
    num_actions = model.config.num_actions
    sums_AV = torch.zeros(num_actions, model.config.vocab_size, dtype=torch.float64)
    weights_A = torch.zeros(num_actions, dtype=torch.float64)
    batches = tokens_NS.split(BATCH_BLOCKS)
    steps = len(batches) * num_actions
    with progress_bar("action vocabulary", steps, unit="step", shown=progress) as bar:
        for tokens_BS in batches:
            context_BC = tokens_BS[:, :-1].to(model.device)
            policy_BCA = model.policy_logits(context_BC).float().softmax(-1)
            weights_A += policy_BCA.sum((0, 1)).double().cpu()
            for action in range(num_actions):
                probs_BCV = model.forward_world_model(context_BC, action).float().softmax(-1)
                sums_AV[action] += (
                    torch.einsum("bc,bcv->v", policy_BCA[..., action], probs_BCV).double().cpu()
                )
                bar.update()
    return sums_AV / weights_A.unsqueeze(1)


@torch.no_grad()
def count_actions(model: ColaScorer, tokens_NS: torch.Tensor) -> list[int]:
    """How often the IDM reads each action from the blocks (argmax)."""
    actions = [model.infer_actions(tokens_BS.to(model.device)) for tokens_BS in tokens_NS.split(BATCH_BLOCKS)]
    return torch.bincount(torch.cat(actions).flatten(), minlength=model.config.num_actions).tolist()


def top_tokens(
    probs_AV: torch.Tensor, counts_A: Sequence[int], tokenizer: PreTrainedTokenizerBase, top: int
) -> list[ActionEntry]:
    """The `top` most telling tokens of every action, from `action_token_probs` and the IDM's `counts_A`."""
    mean_V = probs_AV.mean(0)
    # Tokens that no action ever says have probability 0 both above and below; they cannot be telling.
    tiny = torch.finfo(probs_AV.dtype).tiny
    lift_AV = probs_AV / mean_V.clamp_min(tiny)
    score_AV = probs_AV * lift_AV.clamp_min(tiny).log()
    best_AT = score_AV.topk(min(top, probs_AV.shape[1])).indices
    return [
        ActionEntry(
            action=action,
            usage=counts_A[action] / sum(counts_A),
            tokens=[
                ActionToken(
                    text=visible_token(tokenizer, token),
                    probability=probs_AV[action, token].item(),
                    lift=lift_AV[action, token].item(),
                )
                for token in tokens
            ],
        )
        for action, tokens in enumerate(best_AT.tolist())
    ]


def visible_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Text of one token, white space made visible; its raw name where it is only part of a character."""
    text = decode(tokenizer, [token])
    if not text or "\ufffd" in text:
        return str(tokenizer.convert_ids_to_tokens(token))
    return text.replace(" ", SPACE).replace("\n", NEWLINE).replace("\t", TAB)


def vocabulary_table(entries: Sequence[ActionEntry]) -> Table:
    """One row an action for the terminal, most used first."""
    table = Table(title="What each action makes likely")
    table.add_column("action", justify="right")
    table.add_column("used", justify="right")
    table.add_column("tokens, most telling first")
    for entry in sorted(entries, key=lambda one: -one.usage):
        table.add_row(
            str(entry.action), f"{entry.usage:.1%}", "  ".join(token.text for token in entry.tokens)
        )
    return table


def run(config: ActionVocabularyConfig) -> list[ActionEntry]:
    """Measure, write `config.output`, return the entries."""
    problems = output_problems(config.output, config.overwrite)
    for flag, value, least in (
        ("tokens", config.tokens, 1),
        ("top", config.top, 1),
        ("sequence-length", config.sequence_length, 2),
    ):
        if value < least:
            problems.append(f"--{flag} {value}: must be at least {least}")
    raise_problems(problems)
    data = open_blend(config.data)
    exported = load_exported_model(config.model)
    check_fit(data, exported, config.sequence_length)
    blocks = held_out_blocks(data, sequence_length=config.sequence_length, tokens=config.tokens)
    tokens_NS = torch.cat(list(blocks.values()))
    counts_A = count_actions(exported.model, tokens_NS)
    probs_AV = action_token_probs(exported.model, tokens_NS)
    entries = top_tokens(probs_AV, counts_A, exported.tokenizer, config.top)
    facts = {"model": str(config.model), "data": str(config.data)}
    write_json_whole(config.output, {**facts, "actions": [asdict(entry) for entry in entries]})
    return entries


def main() -> None:
    """Command line."""
    config = tyro.cli(ActionVocabularyConfig, description=__doc__)
    entries = run(config)
    console = Console()
    console.print(vocabulary_table(entries))
    console.print(f"written to {config.output}")


if __name__ == "__main__":
    run_cli(main)
