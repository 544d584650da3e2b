"""Runs go on where they stopped, in FP8 too; a run begun on a GPU goes on on a CPU and the other way round.

Weights and optimizer state are the same files, whichever modules wrote them.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import RunConfig
from tests.gpu.gpu_runs import Device, gpu_recipe, train
from tests.pretrain.tiny_runs import series

pytestmark = pytest.mark.gpu

FIRST_STEPS, ALL_STEPS = 12, 14
LOSS_DIFFERENCE = 0.02  # relative; the two devices round BF16 products differently


def continued(begun: RunConfig, folder: Path, blend: Path, device: Device) -> np.ndarray:
    """Losses of the last steps after a copy of the run `begun` has gone on on `device`."""
    shutil.copytree(begun.run_folder, folder)
    (folder / "config.yaml").write_text(
        (folder / "config.yaml").read_text().replace(str(begun.run_folder), str(folder))
    )
    train(gpu_recipe("base", folder, blend, steps=ALL_STEPS), device, "--resume")
    return series(folder, "loss")[FIRST_STEPS:]


@pytest.mark.parametrize(("begins_on", "goes_on"), [("gpu", "cpu"), ("cpu", "gpu")])
def test_a_run_changes_devices(begins_on: Device, goes_on: Device, tiny_blend: Path, tmp_path: Path) -> None:
    """Its next losses are those of staying; the twin, its own first losses, are far from them."""
    begun = gpu_recipe("base", tmp_path / "begun", tiny_blend, steps=FIRST_STEPS)
    train(begun, begins_on)
    stayed = continued(begun, tmp_path / "stayed", tiny_blend, begins_on)
    moved = continued(begun, tmp_path / "moved", tiny_blend, goes_on)
    assert len(moved) == ALL_STEPS - FIRST_STEPS
    np.testing.assert_allclose(moved, stayed, rtol=LOSS_DIFFERENCE)
    first = series(begun.run_folder, "loss")[: len(moved)]
    assert not np.allclose(first, stayed, rtol=LOSS_DIFFERENCE)


@pytest.mark.parametrize("fp8", ["tensorwise", "delayed", "blockwise"], indirect=True)
def test_an_fp8_run_goes_on(fp8: str, base_run: Path, tiny_blend: Path, tmp_path: Path) -> None:
    """With the losses of a run that was not interrupted, base in FP8 as well; the twin, its first losses, differ."""
    precision = {"fp8": fp8, "base_fp8": "off" if fp8 == "delayed" else fp8}
    losses = {}
    for name, lengths in (("straight", [ALL_STEPS]), ("resumed", [FIRST_STEPS, ALL_STEPS])):
        for steps in lengths:
            config = gpu_recipe("idm", tmp_path / name, tiny_blend, base_run, steps=steps, **precision)
            train(config, "gpu", "--resume")
        losses[name] = series(tmp_path / name, "prediction_loss")
    resumed = losses["resumed"][FIRST_STEPS:]
    assert len(resumed) == ALL_STEPS - FIRST_STEPS
    np.testing.assert_allclose(resumed, losses["straight"][FIRST_STEPS:], rtol=LOSS_DIFFERENCE)
    assert not np.allclose(losses["straight"][: len(resumed)], resumed, rtol=LOSS_DIFFERENCE)


@pytest.mark.parametrize("fp8", ["tensorwise", "delayed"], indirect=True)
def test_a_cpu_builds_on_what_was_trained_in_fp8(
    fp8: str, base_run: Path, tiny_blend: Path, tmp_path: Path
) -> None:
    """The trainer checks the fingerprint of every tensor it loads; a recipe of FP8 leaves no trace in the weights."""
    idm = gpu_recipe("idm", tmp_path / "idm", tiny_blend, base_run, steps=4, fp8=fp8)
    train(idm, "gpu")
    policy = gpu_recipe("policy", tmp_path / "policy", tiny_blend, idm.run_folder, steps=2)
    train(policy, "cpu")
    assert np.isfinite(series(policy.run_folder, "loss")).all()
