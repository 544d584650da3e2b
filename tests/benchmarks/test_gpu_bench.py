"""The GPU benchmark measures the trainer's own loop and real products; without a GPU it says so and stops.

Its functions do not care which device they run on, so all but the FP8 runs are tried here at small sizes.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_bench import (
    GpuBenchConfig,
    Run,
    RunFigures,
    _fp8_product,
    bench_recipe,
    measure_products,
    measure_run,
    results_table,
    runs_to_measure,
    times_full_training,
)
from benchmarks.synthetic_blend import write_synthetic_blend
from data_prep.blended_data import open_blend
from pretrain.config_checks import find_problems
from pretrain.flops import flops_per_token
from tests.repository_rules import ROOT


def small(folder: Path) -> GpuBenchConfig:
    return GpuBenchConfig(
        folder=folder,
        num_layers=2,
        hidden_size=256,
        ffn_hidden_size=512,
        vocab_size=512,
        sequence_length=32,
        micro_batch_size=2,
        base_micro_batch_size=4,
        global_batch_size=4,
        steps=3,
        warmup_steps=1,
        product_seconds=0.01,
    )


@pytest.mark.parametrize("stage", ["idm", "policy", "base"])
def test_a_run_is_measured_by_the_trainers_own_loop(stage: str, tmp_path: Path) -> None:
    config, blend = small(tmp_path), tmp_path / "random_tokens"
    write_synthetic_blend(blend, config.vocab_size, train_tokens=2000, validation_tokens=1000)
    recipe = bench_recipe(config, Run(stage=stage, num_layers=2, precision="fp32"), blend)
    figures = measure_run(recipe, config.steps, config.warmup_steps)
    assert figures.tokens_per_second == pytest.approx(128 / figures.seconds_per_step)
    flops = sum(flops_per_token(recipe).values())
    assert figures.flops_per_token == flops
    assert figures.tflops_per_second == pytest.approx(figures.tokens_per_second * flops / 1e12)
    assert figures.memory_gib > 0
    assert not list(tmp_path.glob("**/checkpoints"))


def test_the_recipes_at_full_size_have_no_problem_but_the_missing_start() -> None:
    config = GpuBenchConfig()
    for run in runs_to_measure(config, fp8=True):
        problems = find_problems(bench_recipe(config, run, Path("blend")), world_size=1)
        wanted = [] if run.stage == "base" else ["start_from"]  # weights are random here
        assert [problem.split(":")[0] for problem in problems] == wanted


def test_synthetic_blend_is_a_blend(tmp_path: Path) -> None:
    write_synthetic_blend(tmp_path / "blend", vocab_size=70_000, train_tokens=2500, validation_tokens=900)
    blend = open_blend(tmp_path / "blend")
    assert (blend.train_tokens, blend.validation_tokens) == ([3000], {"random": 1000})
    assert (blend.vocab_size, blend.eos_id) == (70_000, 69_999)


def test_products_take_the_time_they_are_given(tmp_path: Path) -> None:
    (tflops,) = measure_products(small(tmp_path), ("bf16",)).values()
    assert 0 < tflops < 100


def test_the_fp8_product_is_the_product() -> None:
    """Powers of two are exact in E4M3; the twin with one operand changed is not the product."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        2.0 ** torch.randint(-2, 3, (size, 32), generator=generator).to(torch.bfloat16) for size in (16, 48)
    )
    wanted = (left.float() @ right.float().t()).bfloat16()
    assert torch.equal(_fp8_product(left, right)(), wanted)
    assert not torch.equal(_fp8_product(left, right.flip(1))(), wanted)


def reached(tokens_per_second: float, flops_per_token: float = 1.0) -> RunFigures:
    return RunFigures(
        tokens_per_second=tokens_per_second,
        tflops_per_second=100,
        memory_gib=1,
        seconds_per_step=1,
        flops_per_token=flops_per_token,
    )


def test_each_run_is_held_against_the_ceiling_of_its_precision() -> None:
    runs = {Run(stage="idm", num_layers=2, fp8=fp8): reached(1) for fp8 in ("off", "tensorwise")}
    table = results_table(runs, {"bf16": 200.0, "fp8": 400.0}, title="title")
    assert list(table.columns[3].cells) == ["50.0%", "25.0%"]


def test_full_training_is_compared_with_at_its_own_depth() -> None:
    runs = {
        Run(stage="idm", num_layers=32): reached(7),
        Run(stage="base", num_layers=8): reached(4, flops_per_token=10),
        Run(stage="idm", num_layers=8): reached(6, flops_per_token=5),
    }
    assert times_full_training(runs) == {"idm, 8 blocks, bf16": {"measured": 1.5, "by_flops": 2.0}}


def test_without_a_gpu_it_ends_with_one_line(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "benchmarks/gpu_bench.py", "--folder", str(tmp_path)],
        cwd=ROOT,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: this benchmark needs a CUDA device")
    assert answer.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
