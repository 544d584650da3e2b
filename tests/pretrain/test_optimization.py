"""What is optimised, with which weight decay, and at which learning rate."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel
from pretrain.optimization import build_optimizer, build_scheduler, wrap_for_data_parallel
from pretrain.parallel import ParallelContext
from pretrain.stages.registry import stage_class
from tests.pretrain.tiny_runs import tiny_recipe

PEAK, MINIMUM, WARMUP, DECAY_END, WEIGHT_DECAY = 1e-2, 1e-3, 10, 110, 0.1
OPTIMIZER = {
    "learning_rate": PEAK,
    "min_learning_rate": MINIMUM,
    "warmup_steps": WARMUP,
    "decay_steps": DECAY_END,
    "weight_decay": WEIGHT_DECAY,
}


def recipe(stage: str = "idm", precision: str = "fp32") -> RunConfig:
    """A tiny run with the schedule above."""
    start = None if stage == "base" else Path("start")
    training = {"precision": precision}
    return tiny_recipe(stage, Path("run"), Path("data"), start, optimizer=OPTIMIZER, training=training)


def build(
    config: RunConfig, context: ParallelContext
) -> tuple[ColaModel, DistributedDataParallel, MegatronOptimizer]:
    """Model, its wrapper, its optimizer."""
    stage = stage_class(config)
    model = ColaModel(config, context.groups, (*stage.frozen_parts, *stage.trained_parts))
    model.freeze_all_but(stage.trained_parts)
    ddp = wrap_for_data_parallel(model, context)
    return model, ddp, build_optimizer(config, ddp)


def step_without_gradients(config: RunConfig, context: ParallelContext) -> dict[str, torch.Tensor]:
    """Each tensor after one optimizer step at the peak rate on zero gradients, relative to before."""
    model, ddp, optimizer = build(config, context)
    build_scheduler(config, optimizer, steps_done=WARMUP)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    optimizer.reload_model_params()
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    optimizer.step()
    return {name: parameter.detach() / 2.0 for name, parameter in model.named_parameters()}


def test_weight_decay_is_on_everything_trained_but_the_codebook(context: ParallelContext) -> None:
    """Decoupled: a step without gradients shrinks a tensor by learning rate x decay; norms shrink too."""
    ratios = step_without_gradients(recipe(), context)
    decayed = {name for name, ratio in ratios.items() if not torch.equal(ratio, torch.ones_like(ratio))}
    trained = {name for name in ratios if not name.startswith("base.")}
    assert decayed == trained - {"world_model.codebook_AH"}
    assert any("layernorm" in name for name in decayed)
    for name in decayed:
        torch.testing.assert_close(ratios[name], torch.full_like(ratios[name], 1 - PEAK * WEIGHT_DECAY))


def test_megatrons_own_default_would_spare_the_norms(
    context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault twin: without our map norms do not decay, and the codebook does."""
    import pretrain.optimization

    plain = pretrain.optimization.get_megatron_optimizer
    monkeypatch.setattr(
        pretrain.optimization,
        "get_megatron_optimizer",
        lambda config, chunks, config_overrides: plain(config, chunks),
    )
    ratios = step_without_gradients(recipe(), context)
    assert bool((ratios["world_model.codebook_AH"] != 1).all())
    assert not bool((ratios["idm.blocks.final_layernorm.weight"] != 1).any())


@pytest.mark.parametrize("stage", ["base", "idm", "policy"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_optimizer_holds_fp32_numbers_of_the_trained_tensors_only(
    context: ParallelContext, stage: str, precision: str
) -> None:
    """As many elements as want gradients: frozen tensors have neither moments nor gradient buffers."""
    model, ddp, optimizer = build(recipe(stage, precision), context)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in held) == sum(p.numel() for p in trained)
    assert {p.dtype for p in held} == {torch.float32}
    buffered = {id(p) for buffer in ddp.buffers for p in buffer.params}
    assert buffered == {id(p) for p in trained}


def test_a_step_moves_the_trained_parts_and_leaves_the_base_bit_for_bit(context: ParallelContext) -> None:
    model, ddp, optimizer = build(recipe(), context)
    build_scheduler(recipe(), optimizer, steps_done=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.main_grad.fill_(1.0)
    optimizer.step()
    unchanged = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert unchanged == {name for name in before if name.startswith("base.")}


@pytest.fixture(scope="module")
def optimizer(context: ParallelContext) -> MegatronOptimizer:
    """Only its learning rates are looked at."""
    return build(recipe(), context)[2]


def learning_rate_at(step: int, optimizer: MegatronOptimizer) -> float:
    """Of every group, as the loop sets it before optimizer step number `step`."""
    build_scheduler(recipe(), optimizer, steps_done=step - 1).step(increment=1)
    (rate,) = {group["lr"] for group in optimizer.param_groups}
    return rate


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (1, PEAK / WARMUP),
        (WARMUP // 2, PEAK / 2),
        (WARMUP, PEAK),
        ((WARMUP + DECAY_END) // 2, (PEAK + MINIMUM) / 2),
        (DECAY_END, MINIMUM),
        (DECAY_END + 1, MINIMUM),
        (10 * DECAY_END, MINIMUM),
    ],
)
def test_learning_rate_at_the_corners_of_the_schedule(
    optimizer: MegatronOptimizer, step: int, rate: float
) -> None:
    assert learning_rate_at(step, optimizer) == pytest.approx(rate, rel=1e-9)


def test_learning_rate_between_the_corners(optimizer: MegatronOptimizer) -> None:
    """A straight line up, then half a cosine down; a straight line down, the fault twin, is far off."""
    for step in range(1, DECAY_END + 1):
        share = min(max((step - WARMUP) / (DECAY_END - WARMUP), 0.0), 1.0)
        cosine = MINIMUM + (PEAK - MINIMUM) * (1 + math.cos(math.pi * share)) / 2
        expected = PEAK * step / WARMUP if step <= WARMUP else cosine
        assert learning_rate_at(step, optimizer) == pytest.approx(expected, rel=1e-9)
    quarter = WARMUP + (DECAY_END - WARMUP) // 4
    straight = PEAK - (PEAK - MINIMUM) / 4
    assert abs(learning_rate_at(quarter, optimizer) - straight) > 0.05 * PEAK


def test_the_schedule_is_a_function_of_the_step_alone(optimizer: MegatronOptimizer) -> None:
    """A resumed run stands where the uninterrupted one is."""
    scheduler = build_scheduler(recipe(), optimizer, steps_done=0)
    for step in range(1, DECAY_END + 5):
        scheduler.step(increment=1)
        rate = optimizer.param_groups[0]["lr"]
        assert learning_rate_at(step, optimizer) == rate


def test_no_warmup_starts_at_the_peak(context: ParallelContext) -> None:
    config = dataclasses.replace(recipe(), optimizer=dataclasses.replace(recipe().optimizer, warmup_steps=0))
    optimizer = build(config, context)[2]
    build_scheduler(config, optimizer, steps_done=0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(PEAK)
