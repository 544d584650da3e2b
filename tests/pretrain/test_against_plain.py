"""Losses and gradients of every stage are those of an independent CoLA in plain PyTorch (benchmarks/plain_cola).

One rank, fp32, several micro-batches. Shapes: B batch, S sequence, A actions.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.plain_cola import losses
from benchmarks.plain_cola.model import PlainCola
from benchmarks.plain_cola.trainer import PlainTrainer
from benchmarks.plain_cola.weights import load_from_megatron, method_of, optimizer_of, sizes_of
from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel
from pretrain.model.kernels import local_name
from pretrain.parallel import ParallelContext
from pretrain.stages.contract import Batch
from pretrain.stages.registry import stage_class
from tests.pretrain.plain_twin import CASES, case_recipe, differences, plain_batch
from tests.pretrain.tiny_runs import SEQUENCE_LENGTH, VOCAB_SIZE

MICRO_BATCHES, MICRO_BATCH_SIZE = 3, 2
TOLERANCE = 1e-5
CLEARLY_WRONG = 1000 * TOLERANCE

Fault = Callable[[pytest.MonkeyPatch, PlainCola], None]


def random_batches(device: torch.device) -> list[Batch]:
    """Micro-batches of random tokens, the same ones on every device."""
    generator = torch.Generator().manual_seed(3)
    shape = (MICRO_BATCHES, MICRO_BATCH_SIZE, SEQUENCE_LENGTH + 1)
    tokens = torch.randint(0, VOCAB_SIZE, shape, generator=generator).to(device)
    indices = torch.arange(MICRO_BATCHES * MICRO_BATCH_SIZE, device=device).view(MICRO_BATCHES, -1)
    return [
        Batch(chunk_BS[:, :-1], chunk_BS[:, 1:].contiguous(), indices[i]) for i, chunk_BS in enumerate(tokens)
    ]


def twins(case: str, context: ParallelContext) -> tuple[RunConfig, ColaModel, PlainCola]:
    """Both models with the same weights: large ones, so that no gradient is small, and no norm at one."""
    config = case_recipe(case, Path("runs"), Path("data"))
    stage = stage_class(config)
    model = ColaModel(config, context.groups, (*stage.frozen_parts, *stage.trained_parts))
    model.freeze_all_but(stage.trained_parts)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise + (1.0 if "norm" in name else 0.0))
    plain = PlainCola(sizes_of(config), method_of(config), model.parts).to(context.device)
    load_from_megatron(plain, config, under_local_names(dict(model.named_parameters())))
    return config, model, plain


def under_local_names(tensors: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """As the local modules would name them; fails for a tensor that should be there and is not."""
    assert all(tensor is not None for tensor in tensors.values()), tensors
    return {local_name(name): tensor for name, tensor in tensors.items() if tensor is not None}


def found_differences(
    case: str, context: ParallelContext, patch: pytest.MonkeyPatch, fault: Fault | None = None
) -> dict[str, float]:
    """Relative difference of the loss and of every trained tensor's gradient; `fault` spoils the plain side."""
    config, model, plain = twins(case, context)
    stage = stage_class(config)(config, context.data_parallel_mean)
    batches = random_batches(context.device)
    loss = 0.0
    for batch in batches:
        part = model(stage, batch).loss / len(batches)
        part.backward()
        loss += float(part.detach())
    gradients = under_local_names({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    if fault is not None:
        fault(patch, plain)
    run = PlainTrainer(plain, config.stage, optimizer_of(config))
    plain_loss = float(run.accumulate([plain_batch(config, batch) for batch in batches]))
    plain_gradients = {name: p.grad for name, p in run.trained_parameters().items() if p.grad is not None}
    found = differences(config, stage.trained_parts, gradients, plain_gradients)
    assert found.keys() >= gradients.keys() | plain_gradients.keys()
    return found | {"loss": abs(plain_loss - loss) / abs(loss)}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_are_those_of_the_plain_model(
    case: str, context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = found_differences(case, context, monkeypatch)
    assert max(found.values()) < TOLERANCE, found


def without_shift(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    """Each position takes the action read at itself."""
    patch.setattr(losses, "shift_to_previous", lambda logits_BSA: logits_BSA)


def shift_to_next(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    """The shift in the wrong direction."""
    patch.setattr(losses, "shift_to_previous", lambda logits_BSA: logits_BSA.roll(1, dims=1))


def with_last_position(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    """The position without a next token counts, as in the authors' code."""
    patch.setattr(losses, "mean_but_last", torch.mean)


def regulariser_with_other_sign(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    whole = losses.negative_entropy
    patch.setattr(losses, "negative_entropy", lambda probabilities: -whole(probabilities))


def other_regulariser(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    other = "usage" if plain.method.regulariser == "token" else "token"
    plain.method = dataclasses.replace(plain.method, regulariser=other)  # type: ignore[arg-type]


def other_output(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    other = "residual" if plain.method.output == "reference" else "reference"
    plain.method = dataclasses.replace(plain.method, output=other)  # type: ignore[arg-type]


def other_temperature(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    """It is in the gradients only, of what the choice passes on."""
    plain.method = dataclasses.replace(plain.method, temperature=1.0)


def without_straight_through(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    """The action passes no gradient to the IDM."""
    whole = plain.world_logits
    patch.setattr(plain, "world_logits", lambda hidden, choice: whole(hidden, choice.detach()))


def gate_and_up_exchanged(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    mlp = {
        "base": lambda: plain.layers[0].mlp,
        "world_model": lambda: plain.action_merge_layers[0],
        "policy": lambda: plain.policy_layers[0].mlp,
    }[next(part for part in ("policy", "world_model", "base") if part in plain.parts)]()
    exchange(mlp.gate_proj.weight, mlp.up_proj.weight)  # type: ignore[union-attr, arg-type]


def state_and_action_exchanged(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    """The merge layers read [action; state]."""
    exchange(*plain.action_merge_layers[1].gate_proj.weight.chunk(2, dim=1))  # type: ignore[union-attr, operator]


def key_value_heads_exchanged(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    exchange(*plain.layers[0].self_attn.k_proj.weight.chunk(2))  # type: ignore[union-attr, operator]


def without_rotary_scaling(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    unscaled = dataclasses.replace(plain.sizes, rope_scaling_factor=None)
    other = PlainCola(unscaled, plain.method, []).rotary_frequencies
    plain.rotary_frequencies = other.to(plain.rotary_frequencies.device)


def without_query_bias(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    torch.nn.init.zeros_(plain.layers[0].self_attn.q_proj.bias)  # type: ignore[union-attr, arg-type]


def untied_head(patch: pytest.MonkeyPatch, plain: PlainCola) -> None:
    """The embedding gets no gradient from its use as head."""
    weight_VH = plain.embed_tokens.weight.detach()
    patch.setattr(plain, "base_logits", lambda hidden_BSH: hidden_BSH @ weight_VH.T)


@torch.no_grad()
def exchange(first: torch.Tensor, second: torch.Tensor) -> None:
    """The values of two tensors of one shape."""
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


EVERYWHERE: tuple[Fault, ...] = (gate_and_up_exchanged, key_value_heads_exchanged, without_rotary_scaling)
WITH_ACTIONS: tuple[Fault, ...] = (*EVERYWHERE, without_shift, shift_to_next, with_last_position)
IDM_ONLY: tuple[Fault, ...] = (
    *WITH_ACTIONS, regulariser_with_other_sign, other_regulariser, other_output, other_temperature,
    without_straight_through, state_and_action_exchanged,
)  # fmt: skip
FAULTS = {
    "base": EVERYWHERE,
    "policy": WITH_ACTIONS,
    "idm_reference_token": IDM_ONLY,
    "idm_residual_usage": IDM_ONLY,
    "qwen_base": (key_value_heads_exchanged, without_query_bias, untied_head),
    "qwen_idm": (key_value_heads_exchanged, without_query_bias),
}


@pytest.mark.parametrize(("case", "fault"), [(case, fault) for case in CASES for fault in FAULTS[case]])
def test_a_fault_in_the_plain_model_shows(
    case: str, fault: Fault, context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the comparison would see if the Megatron model had it."""
    found = found_differences(case, context, monkeypatch, fault)
    assert max(found.values()) > CLEARLY_WRONG, found
