"""Five optimizer steps of the real training path are those of the plain trainer (benchmarks/plain_cola).

Everything from the run's start to its last weights: data, accumulation over micro-batches, clipping, AdamW, schedule.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.plain_cola import trainer
from benchmarks.plain_cola.losses import PlainBatch
from benchmarks.plain_cola.model import PlainCola
from benchmarks.plain_cola.settings import PlainOptimizer
from benchmarks.plain_cola.weights import load_from_megatron, method_of, optimizer_of, sizes_of, to_plain
from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel
from pretrain.stages.contract import Batch
from pretrain.stages.registry import stage_class
from tests.pretrain.plain_twin import CASES, case_recipe, differences, plain_batch
from tests.pretrain.tiny_runs import series, train_in_process

STEPS, MICRO_BATCHES_A_STEP = 5, 2
# Strong decay and clipping show in five steps; a larger epsilon keeps rounding from deciding a step's direction.
OPTIMIZER = {
    "weight_decay": 0.2,
    "clip_gradient_norm": 0.1,
    "warmup_steps": 3,
    "decay_steps": 8,
    "epsilon": 1e-5,
}
TOLERANCE = 2e-5
CLEARLY_WRONG = 50 * TOLERANCE

Weights = dict[str, torch.Tensor]
PlainFault = Callable[[pytest.MonkeyPatch], None]


@dataclass
class Recording:
    """What a run of ours began with, read, and ended with."""

    config: RunConfig
    before: Weights = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    after: Weights = field(default_factory=dict)


def tensors_of(model: ColaModel) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def record(config: RunConfig) -> Recording:
    """Train `config`, and look on from the model's forward."""
    recording = Recording(config)
    models: list[ColaModel] = []
    whole = ColaModel.forward

    def forward(model: ColaModel, stage: Any, batch: Batch, *rest: Any) -> Any:
        if not models:
            models.append(model)
            recording.before = tensors_of(model)
        if model.training:
            recording.batches.append(batch)
        return whole(model, stage, batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ColaModel, "forward", forward)
        train_in_process(config)
    recording.after = tensors_of(models[0])
    return recording


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> dict[str, Recording]:
    """A run of every case."""
    folder = tmp_path_factory.mktemp("against_plain")
    return {
        case: record(case_recipe(case, folder, tiny_blend, optimizer=OPTIMIZER, training={"steps": STEPS}))
        for case in CASES
    }


def train_plain(
    recording: Recording, settings: PlainOptimizer, micro_batches: list[PlainBatch]
) -> tuple[Weights, np.ndarray, np.ndarray]:
    """Weights after the same steps of the plain trainer, and each step's loss and gradient norm."""
    config = recording.config
    stage = stage_class(config)
    plain = PlainCola(sizes_of(config), method_of(config), (*stage.frozen_parts, *stage.trained_parts))
    load_from_megatron(plain, config, recording.before)
    run = trainer.PlainTrainer(plain, config.stage, settings)
    size = len(micro_batches) // STEPS
    reports = [run.step(micro_batches[i * size : (i + 1) * size]) for i in range(STEPS)]
    weights = {name: parameter.detach() for name, parameter in run.trained_parameters().items()}
    return weights, np.array([r.loss for r in reports]), np.array([r.gradient_norm for r in reports])


def found_differences(
    recording: Recording,
    settings: PlainOptimizer | None = None,
    micro_batches: list[PlainBatch] | None = None,
) -> dict[str, float]:
    """Relative differences of every trained tensor's change in five steps, of the losses and of the norms."""
    config = recording.config
    parts = stage_class(config).trained_parts
    settings = settings or optimizer_of(config)
    micro_batches = micro_batches or [plain_batch(config, batch) for batch in recording.batches]
    plain_after, losses, norms = train_plain(recording, settings, micro_batches)
    moves = {name: recording.after[name] - recording.before[name] for name in recording.after}
    plain_before = to_plain(config, parts, recording.before)
    plain_moves = {name: plain_after[name] - plain_before[name] for name in plain_after}
    found = differences(config, parts, moves, plain_moves)
    for name, ours, other in (
        ("loss", series(config.run_folder, "loss"), losses),
        ("grad_norm", series(config.run_folder, "grad_norm"), norms),
    ):
        found[name] = float(np.max(np.abs(ours - other) / np.abs(ours)))
    return found


@pytest.mark.parametrize("case", CASES)
def test_five_steps_move_every_tensor_as_the_plain_trainer_does(
    recordings: dict[str, Recording], case: str
) -> None:
    recording = recordings[case]
    assert len(recording.batches) == STEPS * MICRO_BATCHES_A_STEP
    found = found_differences(recording)
    assert max(found.values()) < TOLERANCE, found


def codebook_decayed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer, "NO_WEIGHT_DECAY", "nothing")


def warm_up_from_zero(patch: pytest.MonkeyPatch) -> None:
    """The rate of the step before: the first step does nothing."""
    whole = trainer.learning_rate
    patch.setattr(trainer, "learning_rate", lambda settings, step: whole(settings, step - 1))


@pytest.mark.parametrize(
    ("case", "fault"),
    [("idm_residual_usage", codebook_decayed), *((case, warm_up_from_zero) for case in CASES)],
)
def test_another_rule_of_the_trainer_shows(
    recordings: dict[str, Recording], case: str, fault: PlainFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the comparison would see if the real path had it."""
    fault(monkeypatch)
    assert max(found_differences(recordings[case]).values()) > CLEARLY_WRONG


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "changed",
    [
        {"weight_decay": 0.0},
        {"clip_gradient_norm": 1e9},
        {"warmup_steps": 2},
        {"decay_steps": 800},
        {"min_learning_rate": 0.0},
        {"beta1": 0.95},
        {"beta2": 0.95},
    ],
)
def test_another_setting_shows(
    recordings: dict[str, Recording], case: str, changed: dict[str, float]
) -> None:
    recording = recordings[case]
    settings = dataclasses.replace(optimizer_of(recording.config), **changed)  # type: ignore[arg-type]
    assert max(found_differences(recording, settings).values()) > CLEARLY_WRONG


def exchanged_steps(batches: list[PlainBatch]) -> list[PlainBatch]:
    """The first step's micro-batches come second."""
    size = MICRO_BATCHES_A_STEP
    return [*batches[size : 2 * size], *batches[:size], *batches[2 * size :]]


def first_micro_batch_only(batches: list[PlainBatch]) -> list[PlainBatch]:
    """The other micro-batches of a step are left out of its mean."""
    return batches[::MICRO_BATCHES_A_STEP]


def noise_of_other_samples(batches: list[PlainBatch]) -> list[PlainBatch]:
    return [batch._replace(noise_BSA=batch.noise_BSA.flip(0)) for batch in batches]  # type: ignore[union-attr]


READING_FAULTS = [
    *((case, fault) for case in CASES for fault in (exchanged_steps, first_micro_batch_only)),
    ("idm_reference_token", noise_of_other_samples),
    ("idm_residual_usage", noise_of_other_samples),
]


@pytest.mark.parametrize(("case", "fault"), READING_FAULTS)
def test_another_order_of_data_or_noise_shows(
    recordings: dict[str, Recording], case: str, fault: Callable[[list[PlainBatch]], list[PlainBatch]]
) -> None:
    recording = recordings[case]
    micro_batches = fault([plain_batch(recording.config, batch) for batch in recording.batches])
    assert max(found_differences(recording, micro_batches=micro_batches).values()) > CLEARLY_WRONG
