"""What the tests of the soak share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from benchmarks.synthetic_blend import write_synthetic_blend
from tests.pretrain.tiny_runs import tiny_recipe, train_in_process


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after six steps, with two checkpoints."""
    folder = tmp_path_factory.mktemp("soak_run")
    write_synthetic_blend(folder / "data", 512, 10_000, 2_000)
    train_in_process(tiny_recipe("base", folder / "run", folder / "data"))
    return folder / "run"
