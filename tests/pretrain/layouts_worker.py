"""Every stage under every layout, then with faults; each layout is a set of forked processes, one a rank.

Started by tests/pretrain/test_layouts.py, with the folders DATA REFERENCE_RUNS OUTPUT. The ranks are new for each
layout, since gloo keeps the threads of every group it made.
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain import cpu_redirects

cpu_redirects.apply()

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

import pretrain.model.token_loss
import pretrain.model.trunk
import pretrain.model.world_model
import pretrain.pipeline
import pretrain.stages.idm
from pretrain.model.norm import RmsNorm
from pretrain.model.trunk import LlamaTrunk
from pretrain.placement import BlockHalves
from pretrain.run import train
from pretrain.train_loop import TrainLoop
from tests.forked_ranks import run_ranks
from tests.pretrain.layouts import FAULTS, LAYOUTS, SAVED, Layout, layout_recipe

WHOLE_NOISE = pretrain.stages.idm.gumbel_noise
WHOLE_NORM = RmsNorm.__init__
WHOLE_LOSSES = pretrain.model.token_loss._losses_to_probabilities
WHOLE_HIDDEN = LlamaTrunk.hidden
WHOLE_SUBMODULES = pretrain.model.trunk.block_submodules


def train_layout(name: str, layout: Layout, data: Path, reference: Path, output: Path) -> None:
    """Train the layout's stages on forked ranks."""
    run_ranks(layout.ranks, output / f"rendezvous_{name}", run_rank, name, layout, data, reference, output)


def run_rank(name: str, layout: Layout, data: Path, reference: Path, output: Path) -> None:
    """One rank of a layout, through its stages."""
    for stage in layout.stages:
        train(
            layout_recipe(layout, stage, output / name / stage, data, reference),
            resume=False,
            overwrite=False,
        )


def noise_by_rank(seed: int, *arguments: object) -> torch.Tensor:
    """The fault of drawing noise by rank instead of by sample."""
    return WHOLE_NOISE(seed + 1 + dist.get_rank(), *arguments)  # type: ignore[arg-type]


def without_sum_over_ranks(choice_SBA: torch.Tensor, group: object) -> torch.Tensor:
    """The fault of forgetting that each rank's part of the table gives part of the gradient."""
    return choice_SBA


def unmarked_norm(self: RmsNorm, *arguments: object, **options: object) -> None:
    """The fault of norms whose gradients Megatron does not sum, since nobody told it to."""
    WHOLE_NORM(self, *arguments, **options)  # type: ignore[arg-type]
    self.weight.sequence_parallel = False  # type: ignore[attr-defined]


class _Alone:
    """A tensor-parallel group that thinks it is of one rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def rank(self) -> int:
        """As in the whole group."""
        return self.group.rank()

    def size(self) -> int:
        """Wrong."""
        return 1


def losses_of_own_part(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """The fault of a softmax over this rank's part of the vocabulary."""
    return WHOLE_LOSSES(logits_TV, labels_T, _Alone(group))  # type: ignore[arg-type]


def hidden_in_another_order(
    self: LlamaTrunk, tokens_BS: torch.Tensor, state: torch.Tensor | None = None
) -> torch.Tensor:
    """The fault of a stage that runs its blocks backwards."""
    layers = self.decoder.layers
    whole, self.decoder.layers = layers, torch.nn.ModuleList(reversed(layers))
    try:
        return WHOLE_HIDDEN(self, tokens_BS, state)
    finally:
        self.decoder.layers = whole


def halves_exchanged(blocks: Sequence[BlockHalves]) -> TransformerBlockSubmodules:
    """The fault of an MLP on the stage before and its attention on the one after."""
    return WHOLE_SUBMODULES([BlockHalves(attention=block.mlp, mlp=block.attention) for block in blocks])


def halves_on_both_stages(blocks: Sequence[BlockHalves]) -> TransformerBlockSubmodules:
    """The fault of running all of a block that is cut twice."""
    return WHOLE_SUBMODULES([BlockHalves() for _ in blocks])


PLANTED: dict[str, tuple[object, str, object]] = {
    "noise_by_rank": (pretrain.stages.idm, "gumbel_noise", noise_by_rank),
    "choice_gradient_not_summed": (
        pretrain.model.world_model,
        "copy_to_tensor_model_parallel_region",
        without_sum_over_ranks,
    ),
    "norm_gradient_not_summed": (RmsNorm, "__init__", unmarked_norm),
    "boundary_without_gradient": (pretrain.pipeline, "TRAINED_FIELD", {"idm": None}),
    "label_loss_of_one_vocabulary_part": (
        pretrain.model.token_loss,
        "_losses_to_probabilities",
        losses_of_own_part,
    ),
    "layers_in_another_order": (LlamaTrunk, "hidden", hidden_in_another_order),
    "halves_exchanged": (pretrain.model.trunk, "block_submodules", halves_exchanged),
    "halves_on_both_stages": (pretrain.model.trunk, "block_submodules", halves_on_both_stages),
}


def with_fault(fault: str, run: Callable[[], None]) -> None:
    """Run with the fault planted, then take it out again."""
    place, name, planted = PLANTED[fault]
    whole = getattr(place, name)
    setattr(place, name, planted)
    try:
        run()
    finally:
        setattr(place, name, whole)


def train_without_saving(loop: TrainLoop, step: int, last: bool, asked_to_stop: bool) -> None:
    """Instead of `TrainLoop.save_or_stop`, since saving takes longer than the training."""


def main() -> None:
    """All layouts and faults in one launch; only one of them saves."""
    data, reference, output = (Path(argument) for argument in sys.argv[1:4])
    saving = TrainLoop.save_or_stop
    for name, layout in LAYOUTS.items():
        TrainLoop.save_or_stop = saving if name == SAVED else train_without_saving  # type: ignore[assignment,method-assign]
        train_layout(name, layout, data, reference, output)
    for name, layout in FAULTS.items():
        with_fault(name, lambda n=name, at=layout: train_layout(n, at, data, reference, output))  # type: ignore[misc]
