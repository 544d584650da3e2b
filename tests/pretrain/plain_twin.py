"""A Megatron model and its plain PyTorch twin, and how far two sets of their tensors are apart.

Shapes: B batch, S sequence, A actions.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.plain_cola.losses import PlainBatch
from benchmarks.plain_cola.weights import from_plain, to_plain
from pretrain.actions import gumbel_noise
from pretrain.config import RunConfig, StageName
from pretrain.stages.contract import Batch
from tests.pretrain.tiny_runs import MODEL, tiny_recipe

SIZES = {"num_actions": 16, "num_idm_layers": 2, "num_merge_layers": 2, "num_policy_layers": 2}
# The coefficients are large enough that a fault in a regulariser shows.
REFERENCE = {**SIZES, "output": "reference", "regulariser": "token", "regulariser_coefficient": 0.3}
RESIDUAL = {**SIZES, "output": "residual", "regulariser": "usage", "regulariser_coefficient": 1.0}

# As Qwen2.5: biases on queries, keys and values, the embedding as head, no rotary scaling.
QWEN = {**MODEL, "qkv_bias": True, "tied_embeddings": True, "rope_scaling_factor": None}


class Case(NamedTuple):
    """What is compared."""

    stage: StageName
    actions: dict[str, Any]
    """Fields of `actions`."""
    model: dict[str, Any] = MODEL
    """Fields of `model`."""
    start: str | None = None
    """The case whose run this one starts from."""


CASES = {
    "base": Case("base", SIZES),
    "idm_reference_token": Case("idm", REFERENCE, start="base"),
    "idm_residual_usage": Case("idm", RESIDUAL, start="base"),
    "policy": Case("policy", RESIDUAL, start="idm_residual_usage"),
    "qwen_base": Case("base", SIZES, QWEN),
    "qwen_idm": Case("idm", REFERENCE, QWEN, start="qwen_base"),
}


def case_recipe(name: str, folder: Path, data_folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """The tiny recipe of a case; runs are neighbours in `folder`, named like their cases."""
    case = CASES[name]
    start_from = folder / case.start if case.start else None
    return tiny_recipe(
        case.stage, folder / name, data_folder, start_from, model=case.model, actions=case.actions, **sections
    )


def plain_batch(config: RunConfig, batch: Batch) -> PlainBatch:
    """The same micro-batch with the noise that the stage draws for it."""
    length = batch.tokens_BS.shape[1]
    noise_SBA = gumbel_noise(config.seed, batch.sample_index_B, length, config.actions.num_actions)
    return PlainBatch(batch.tokens_BS, batch.labels_BS, noise_SBA.transpose(0, 1))


def differences(
    config: RunConfig,
    parts: tuple[str, ...],
    megatron: dict[str, torch.Tensor],
    plain: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Difference of each tensor of `parts`, relative to its norm.

    Under both models' names: one has queries, keys and values apart, the other the halves for state and action.
    """
    as_plain, as_megatron = to_plain(config, parts, megatron), from_plain(config, parts, plain)
    pairs = {name: (as_plain[name], plain[name]) for name in as_plain}
    pairs |= {name: (megatron[name], as_megatron[name]) for name in as_megatron}
    return {name: float((ours - other).norm() / ours.norm()) for name, (ours, other) in pairs.items()}
