"""A base with a padded vocabulary, and what must not depend on the padding: losses, logits, gradients.

As a program, with the folder OUTPUT, it writes them on two ranks for every case, without a fault and with.

Shapes: S sequence, B batch, H hidden, V vocabulary.
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pretrain import cpu_redirects

cpu_redirects.apply()

import torch
import torch.distributed as dist

import pretrain.model.token_loss
import pretrain.model.trunk
from pretrain.model.cola import ColaModel
from pretrain.model.trunk import LlamaTrunk
from pretrain.parallel import ParallelContext, parallel_context
from tests.forked_ranks import run_ranks
from tests.pretrain.tiny_runs import UNLIKE_SIZES, tiny_recipe

S, B, H = 7, 3, UNLIKE_SIZES["hidden_size"]
# Tokens and rows after them; on two ranks the second one holds tokens and padding, or nothing but padding.
VOCABULARIES = {"partly": (60, 20), "only": (40, 40)}
RANKS = 2


@dataclass(frozen=True)
class Case:
    """A base of one kind."""

    trained: bool
    """Trained, or frozen."""
    tied: bool
    """The head is the embedding."""
    padding: str
    """What a second rank holds of `VOCABULARIES`."""

    @property
    def name(self) -> str:
        """Such as trained_tied_partly."""
        kind = "trained" if self.trained else "frozen"
        return f"{kind}_{'tied' if self.tied else 'untied'}_{self.padding}"


CASES = [
    Case(trained, tied, padding)
    for trained in (True, False)
    for tied in (True, False)
    for padding in VOCABULARIES
]


def build(context: ParallelContext, case: Case, padded: bool, filling: float, precision: str) -> LlamaTrunk:
    """The base: the same random rows of tokens however it is padded, and rows of +-`filling` after them."""
    tokens, padding = VOCABULARIES[case.padding]
    recipe = tiny_recipe(
        "base" if case.trained else "idm",
        Path("run"),
        Path("data"),
        None if case.trained else Path("start"),
        model={
            **UNLIKE_SIZES,
            "vocab_size": tokens,
            "vocab_padding": padding if padded else 0,
            "num_layers": 1,
            "tied_embeddings": case.tied,
        },
        training={"precision": precision},
        parallel={"tensor_parallel_size": context.tensor_parallel_size},
    )
    base = ColaModel(recipe, context.groups, ("base",)).base
    base.requires_grad_(case.trained)
    generator = torch.Generator().manual_seed(3)
    signs_H = torch.tensor([1.0, -1.0]).repeat(H // 2)
    for weight in dict.fromkeys((base.embedding.word_embeddings.weight, base.head_weight)):
        rows_VH = torch.cat(
            [torch.randn(tokens, H, generator=generator), filling * signs_H.repeat(padding, 1)]
        )
        first = len(weight) * context.groups.tp.rank()
        with torch.no_grad():
            weight.copy_(rows_VH[first : first + len(weight)])
    return base


def outcome(
    context: ParallelContext, case: Case, padded: bool, filling: float = 3e38, precision: str = "fp32"
) -> dict[str, torch.Tensor]:
    """Losses and gradients of embedded tokens and of a state beside them; weights' gradients over all ranks."""
    base = build(context, case, padded, filling, precision)
    tokens = VOCABULARIES[case.padding][0]
    generator = torch.Generator().manual_seed(4)
    tokens_BS, labels_BS = torch.randint(tokens, (2, B, S), generator=generator)
    state_SBH = torch.randn(S, B, H, generator=generator).to(base.head_weight.dtype).requires_grad_()
    losses_SB = base.token_losses(base.embedding(tokens_BS, position_ids=None) + state_SBH, labels_BS)
    (losses_SB * torch.randn(S, B, generator=generator)).sum().backward()
    assert state_SBH.grad is not None
    with torch.no_grad():
        logits_SBV = whole(base.logits(state_SBH), context, axis=2)
    found = {"losses": losses_SB.detach(), "state": state_SBH.grad, "probabilities": logits_SBV.softmax(-1)}
    if case.trained:
        found["embedding"] = whole(base.embedding.word_embeddings.weight.grad, context, axis=0)
        found["head"] = whole(base.head_weight.grad, context, axis=0)
    return found


def whole(part: torch.Tensor | None, context: ParallelContext, axis: int) -> torch.Tensor:
    """All tensor-parallel ranks' parts together."""
    assert part is not None
    parts = [torch.empty_like(part) for _ in range(context.tensor_parallel_size)]
    dist.all_gather(parts, part.contiguous(), group=context.groups.tp)
    return torch.cat(parts, axis)


@contextmanager
def padding_as_tokens() -> Iterator[None]:
    """The fault of a softmax over the padded rows too."""
    modules = (pretrain.model.token_loss, pretrain.model.trunk)
    masking = pretrain.model.token_loss.exclude_padding
    for module in modules:
        module.exclude_padding = lambda logits, tokens_here: logits  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.exclude_padding = masking  # type: ignore[attr-defined]


def run_rank(output: Path) -> None:
    """All cases, on one of the ranks."""
    with parallel_context(tensor_parallel_size=RANKS, seed=0) as context:
        for case in CASES:
            found = {"": outcome(context, case, padded=True)}
            with padding_as_tokens():
                found["_fault"] = outcome(context, case, padded=True, filling=10.0)
            if context.is_first_rank:
                for suffix, tensors in found.items():
                    torch.save(tensors, output / f"{case.name}{suffix}.pt")


def main() -> None:
    """The program that the tests start."""
    output = Path(sys.argv[1])
    run_ranks(RANKS, output / "rendezvous", run_rank, output)
