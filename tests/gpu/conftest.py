"""What the GPU tests share: process groups, a trained base, and a skip where an FP8 recipe cannot run."""

# ruff: noqa: E402  Megatron is imported after the redirects
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain import cpu_redirects

cpu_redirects.apply()

from pretrain.backends import find_backends, fp8_obstacle
from pretrain.parallel import ParallelContext, parallel_context
from tests.gpu.gpu_runs import BASE_STEPS, gpu_recipe, train


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    """One rank's process groups, on the GPU."""
    with parallel_context(tensor_parallel_size=1, seed=0) as opened:
        yield opened


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
