"""What two models compute on the same random tokens, layer by layer: the first module that differs, and how.

Both run in fp32 on weights of the same rounding, so what differs is arithmetic that is not the same. The probe's
positions begin at 0 and end at the last one that both models have, since errors in rotary positions grow with them.
Shapes: S sequence, K the positions at which token logits are made, H hidden, X either of H, V or A.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from checkpoint_tools.comparison.huggingface_side import HuggingFaceModel
from checkpoint_tools.comparison.layerwise_model import LayerwiseModel, Probe
from checkpoint_tools.comparison.megatron_side import MegatronModel
from checkpoint_tools.formats.opened_model import OpenedCheckpoint, OpenedModel
from pretrain.actions import shift_to_previous
from pretrain.parallel import parallel_context

# Of an output's length. Sums in another order give 1e-6 a layer with large random weights, 2e-5 after 24 layers.
# Another computation gives 1e-3 (one weight of a matrix changed) to 1 (another RoPE, permuted heads).
TOLERANCE = 1e-4
# Of the difference at its worst position: below this a position hardly differs.
START = 1e-3
# Positions at which token logits are made: those of all would be the largest tensors here, and h has been compared.
LOGITS_POSITIONS = 16
SEED = 0

Record = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class AtPosition:
    """How one output differs at one position."""

    position: int
    """Where in the text."""
    relative: float
    """Length of the difference over the length of the left output."""
    kl_nats: float | None
    """Divergence of the right distribution from the left one, where the output is logits."""


@dataclass(frozen=True, kw_only=True)
class OutputDifference:
    """How one output differs, over all positions."""

    module: str
    """What computed it."""
    max_abs: float
    """Greatest difference of two elements."""
    relative: float
    """Greatest `AtPosition.relative`."""
    agrees_at_start: bool
    """Nearly no difference at position 0, where attention has no choice: later it attends to something else."""
    at: tuple[AtPosition, ...]
    """First, middle and last position."""

    @property
    def equal(self) -> bool:
        """Within fp32's tolerance."""
        return self.relative <= TOLERANCE  # not if it is no number


def compare_outputs(
    left: OpenedModel,
    right: OpenedModel,
    parts: tuple[str, ...],
    probe: Probe,
    dtypes: Mapping[str, torch.dtype],
) -> list[OutputDifference]:
    """Run `parts` of both models, one after the other, on `probe`.

    `dtypes` says, by Hugging Face name, what both models' weights are rounded to. Returns the outputs in the order in
    which they are computed.
    """
    found: dict[str, torch.Tensor] = {}
    differences: list[OutputDifference] = []

    def compare(module: str, output: torch.Tensor) -> None:
        differences.append(_difference(module, found.pop(module), output, probe))

    with torch.no_grad():
        with _layerwise_model(left, parts, probe, dtypes) as model:
            actions_S = _run(model, parts, probe, found.__setitem__)
        with _layerwise_model(right, parts, probe, dtypes) as model:
            _run(model, parts, probe, compare, actions_S)
    return differences


def make_probe(left: OpenedModel, right: OpenedModel, tokens: int) -> Probe:
    """Random tokens: three quarters at the first positions, the rest at the last that both models have."""
    positions = min(left.model.max_position_embeddings, right.model.max_position_embeddings)
    length = min(tokens, positions)
    near = length - length // 4
    generator = torch.Generator().manual_seed(SEED)
    return Probe(
        tokens_S=torch.randint(left.model.vocab_size, (length,), generator=generator),
        actions_S=torch.randint(left.actions.num_actions, (length,), generator=generator),
        runs=(range(near), range(positions - (length - near), positions)),
    )


@contextmanager
def _layerwise_model(
    opened: OpenedModel, parts: tuple[str, ...], probe: Probe, dtypes: Mapping[str, torch.dtype]
) -> Iterator[LayerwiseModel]:
    if isinstance(opened.source, OpenedCheckpoint):
        with parallel_context(tensor_parallel_size=1, seed=SEED) as context, _all_cores():
            yield MegatronModel(opened.source, parts, probe, dtypes, context.groups)
    else:
        with _all_cores():
            yield HuggingFaceModel(opened, probe, dtypes)


@contextmanager
def _all_cores() -> Iterator[None]:
    """Compute with all of them, where the user does not say otherwise: ranks have one each, and here is one rank."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(
    model: LayerwiseModel,
    parts: tuple[str, ...],
    probe: Probe,
    record: Record,
    actions_S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Give `record` each output when it is computed; the world model's under `actions_S`, else under the IDM's.

    Returns:
        The actions [S].
    """
    for label, layer in model.layers.items():
        layer.register_forward_hook(_recorder(label, record))
    hidden_SH = model.hidden()
    record("h", hidden_SH)
    states_KH = {"base logits": hidden_SH[_kept(probe)]}
    if "idm" in parts:
        logits_SA = model.action_logits("idm", hidden_SH)
        record("IDM logits", logits_SA)
        actions_S = shift_to_previous(logits_SA).argmax(-1) if actions_S is None else actions_S
    actions_S = probe.actions_S if actions_S is None else actions_S
    if "world_model" in parts:
        state_SH = model.world_state(hidden_SH, actions_S)
        record("world-model state", state_SH)
        states_KH["world-model logits"] = state_SH[_kept(probe)]
    if "policy" in parts:
        record("policy logits", model.action_logits("policy", hidden_SH))
    logits = model.token_logits(torch.cat(list(states_KH.values())))
    for label, logits_KV in zip(states_KH, logits.chunk(len(states_KH)), strict=True):
        record(label, logits_KV)
    return actions_S


def _recorder(label: str, record: Record) -> Callable[[nn.Module, object, object], None]:
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        state = output[0] if isinstance(output, tuple) else output
        assert isinstance(state, torch.Tensor)
        record(label, state.flatten(0, 1))  # the batch of one is first or second

    return hook


def _kept(probe: Probe) -> torch.Tensor:
    """Indices [K] of the positions at which token logits are made."""
    return torch.linspace(0, len(probe.tokens_S) - 1, LOGITS_POSITIONS).round().long().unique()


def _difference(module: str, left_SX: torch.Tensor, right_SX: torch.Tensor, probe: Probe) -> OutputDifference:
    """Of outputs at all positions, or at those of `_kept`."""
    kept_K, positions_S = _kept(probe), probe.positions()
    rows = kept_K if len(left_SX) == len(positions_S) else torch.arange(len(kept_K))
    smallest = torch.finfo(left_SX.dtype).tiny  # so that nothing over nothing is 0, and only NaN is NaN
    relative_S = (right_SX - left_SX).norm(dim=-1) / left_SX.norm(dim=-1).clamp_min(smallest)
    kl_S = _kl_nats(left_SX, right_SX) if module.endswith("logits") else None
    return OutputDifference(
        module=module,
        max_abs=float((right_SX - left_SX).abs().max()),
        relative=float(relative_S.max()),
        agrees_at_start=bool(relative_S[0] < START * relative_S.max()),
        at=tuple(
            AtPosition(
                position=int(positions_S[kept_K[place]]),
                relative=float(relative_S[rows[place]]),
                kl_nats=None if kl_S is None else float(kl_S[rows[place]]),
            )
            for place in (0, len(kept_K) // 2, -1)
        ),
    )


def _kl_nats(left_SX: torch.Tensor, right_SX: torch.Tensor) -> torch.Tensor:
    left, right = left_SX.double().log_softmax(-1), right_SX.double().log_softmax(-1)
    return (left.exp() * (left - right)).sum(-1)
