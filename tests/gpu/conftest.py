"""What the GPU tests share: process groups, a trained base, and a skip where an FP8 recipe cannot run."""

from pathlib import Path

import pytest

from pretrain.backends import find_backends, fp8_obstacle
from tests.gpu.gpu_runs import BASE_STEPS, gpu_recipe, train
from tests.pretrain.conftest import context  # noqa: F401  the same fixture; imported, it also redirects Megatron


@pytest.fixture(scope="session")
def base_run(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    """A base trained in BF16, far enough to have a loss that noise in its weights would change."""
    folder = tmp_path_factory.mktemp("gpu_base") / "base"
    train(gpu_recipe("base", folder, tiny_blend, steps=BASE_STEPS), "gpu")
    return folder


@pytest.fixture
def fp8(request: pytest.FixtureRequest) -> str:
    """An FP8 recipe, or `off`; skips, with the reason, what this GPU or installation cannot run."""
    recipe: str = request.param
    obstacle = None if recipe == "off" else fp8_obstacle(recipe, find_backends())
    if obstacle is not None:
        pytest.skip(f"FP8 {recipe} needs {obstacle}")
    return recipe
