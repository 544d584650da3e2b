"""On a GPU both stages train in BF16 and in FP8, and a base in FP8 predicts as well as in BF16.

Speed and memory are printed (pytest -s), never asserted.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pretrain.checkpoints.checkpoint_folder import read_description, resolve_checkpoint, step_folder
from pretrain.doctor import diagnose
from pretrain.doctor_checks import look_at_machine
from tests.gpu.gpu_runs import YOUNGER_STEPS, gpu_recipe, print_speed, train
from tests.pretrain.tiny_runs import series

pytestmark = pytest.mark.gpu

# Largest relative change of the base's validation loss between FP8 and BF16.
BASE_DRIFT = 0.005


def base_recipe_of(fp8: str) -> str:
    """Delayed scaling keeps a history that a frozen base never gets."""
    return "off" if fp8 == "delayed" else fp8


@pytest.mark.parametrize("fp8", ["off", "tensorwise", "delayed", "blockwise"], indirect=True)
def test_both_stages_train(fp8: str, base_run: Path, tiny_blend: Path, tmp_path: Path) -> None:
    """Finite losses that fall; the policy starts from the IDM just trained."""
    precision = {"fp8": fp8, "base_fp8": base_recipe_of(fp8)}
    start_from = base_run
    for stage, name in (("idm", "prediction_loss"), ("policy", "loss")):
        config = gpu_recipe(stage, tmp_path / f"{stage}_{fp8}", tiny_blend, start_from, **precision)
        train(config, "gpu")
        losses = series(config.run_folder, name)
        assert np.isfinite(losses).all()
        assert losses[-4:].mean() < losses[:4].mean()
        print_speed(config)
        start_from = config.run_folder


@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise"], indirect=True)
def test_a_base_in_fp8_keeps_its_loss(fp8: str, base_run: Path, tiny_blend: Path, tmp_path: Path) -> None:
    """The same weights, quantised once; the twin is the same base with a quarter of its training undone."""
    losses = {}
    for name in ("off", fp8):
        config = gpu_recipe("idm", tmp_path / name, tiny_blend, base_run, steps=1, base_fp8=name)
        train(config, "gpu")
        losses[name] = float(series(config.run_folder, "base_loss", "validation")[-1])
    print(f"\nbase loss: BF16 {losses['off']:.5f}, FP8 {fp8} {losses[fp8]:.5f}")
    assert abs(losses[fp8] / losses["off"] - 1) <= BASE_DRIFT
    younger = step_folder(base_run, YOUNGER_STEPS)
    twin = gpu_recipe("idm", tmp_path / "twin", tiny_blend, younger, steps=1)
    train(twin, "gpu")
    other = float(series(twin.run_folder, "base_loss", "validation")[-1])
    assert abs(other / losses["off"] - 1) > BASE_DRIFT


@pytest.mark.parametrize("fp8", ["off", "tensorwise"], indirect=True)
def test_a_deterministic_run_gives_the_same_bits_again(
    fp8: str, base_run: Path, tiny_blend: Path, tmp_path: Path
) -> None:
    """Losses, gradient norms and the last weights; the twin is a run of another seed."""
    ends = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        precision = {"fp8": fp8, "base_fp8": fp8, "deterministic": True}
        config = replace(gpu_recipe("idm", tmp_path / name, tiny_blend, base_run, **precision), seed=seed)
        train(config, "gpu")
        fingerprints = read_description(resolve_checkpoint(config.run_folder)).fingerprints
        lines = [series(config.run_folder, metric).tolist() for metric in ("loss", "grad_norm")]
        ends[name] = (lines, fingerprints)
    assert ends["first"] == ends["again"]
    assert ends["first"][0] != ends["other"][0] and ends["first"][1] != ends["other"][1]


def test_the_doctor_finds_this_machine_fit() -> None:
    backends, findings = diagnose(look_at_machine(), [])
    assert backends is not None and backends.cuda and backends.device_count > 0
    assert not [finding.text for finding in findings if finding.stops]
