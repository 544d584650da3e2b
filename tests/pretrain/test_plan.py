"""The printed plan says what the planner found, in 80 columns, and a run that cannot fit is refused with the remedy."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pretrain.config import RunConfig
from pretrain.plan import find_plan_problems, print_plan
from pretrain.planning.memory import GIB, fullest_stage_memory
from pretrain.recipes import load_recipe
from tests.pretrain.tiny_runs import tiny_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def full_size(stage: str, *overrides: str) -> RunConfig:
    """The Llama-3.1-8B recipe."""
    return load_recipe(CONFIGS / f"{stage}_llama31_8b.yaml", list(overrides))


def printed(config: RunConfig, gpus: int, width: int = 80) -> str:
    """The plan as a file or pipe gets it."""
    console = Console(file=io.StringIO(), width=width)
    print_plan(config, gpus, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def words(text: str) -> str:
    """Without frames and line ends."""
    return " ".join(re.sub(r"[^\x00-\x7f]", " ", text).split())


def test_a_plan_tells_its_figures() -> None:
    text = words(printed(full_size("idm"), 64))
    for figure in (
        "base 8,030,261,248 0",
        "idm 872,714,240 872,714,240",
        "in all 9,490,440,192 1,460,178,944",
        "base forward 14,495.515 60.6%",
        "in all 23,935.320 100.0%",
        "Training the base itself takes 1.95 times as many",
        "190,735 steps x 1,048,576 tokens = 200,000,143,360 tokens",
        "64 GPUs = tensor 1 x pipeline 1 x data 64; 2 micro-batches of 4 sequences",
        "frozen weights 14.96",
        "gradients 5.44",
        "Fits: A100 80 GB, H100 80 GB, H200 141 GB, B200 180 GB.",
        "H100 BF16 40 % 16,535 1,058,212 3,360 2.2",
        "estimated, not measured",
    ):
        assert figure in text, figure
    assert "FP8" not in text


@pytest.mark.parametrize("stage", ["idm", "policy"])
def test_a_plan_fits_80_columns_and_is_plain_text(stage: str) -> None:
    fp8 = ("--training.fp8", "tensorwise", "--training.base-fp8", "tensorwise")
    text = printed(full_size(stage, *fp8, "--parallel.pipeline-parallel-size", "4"), 64)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    assert "\u2026" not in text  # nothing is cut off
    assert "of it in FP8" in text and "FP8 37.6 %" in text
    assert re.search(r"Balance \d+\.\d%", words(text))


@pytest.mark.parametrize("stage", ["base", "idm", "policy"])
def test_a_small_fp32_run_has_a_plan_without_speeds(stage: str) -> None:
    text = words(printed(tiny_recipe(stage, Path("run"), Path("data"), Path("start")), 1))
    assert "no estimate for an fp32 run" in text
    assert "H100 BF16" not in text
    assert ("the most that freezing it can gain" in text) == (stage != "base")


def test_what_does_not_fit_is_said_with_its_kinds_and_remedies() -> None:
    config = full_size("idm")
    needed_gib = sum(fullest_stage_memory(config, 8)[1].values()) / GIB
    (problem,) = find_plan_problems(config, 8, needed_gib - 0.1, "Small GPU")
    assert problem.startswith("parallel.tensor_parallel_size: ")
    assert "\n" not in problem
    for words_of_it in (
        f"{needed_gib:.1f} GiB",
        "Small GPU has",
        "frozen weights 15.0",
        "gradients 5.4",
        "parallel.pipeline_parallel_size",
        "training.micro_batch_size",
    ):
        assert words_of_it in problem
    assert find_plan_problems(config, 8, needed_gib + 0.1, "Small GPU") == []


def test_the_largest_known_gpu_is_the_measure_where_none_is_named() -> None:
    assert find_plan_problems(full_size("policy"), 8) == []
    (problem,) = find_plan_problems(full_size("policy", "--training.micro-batch-size", "64"), 8)
    assert "B200 has 167.6" in problem


def test_remedies_help() -> None:
    """What the line names makes the same run fit."""
    for remedy in (
        ("--parallel.tensor-parallel-size", "2"),
        ("--parallel.pipeline-parallel-size", "2"),
        ("--training.micro-batch-size", "2"),
    ):
        before, after = (
            sum(fullest_stage_memory(full_size("idm", *arguments), 8)[1].values())
            for arguments in ((), remedy)
        )
        assert after < 0.95 * before


def test_a_plan_is_made_without_torch() -> None:
    """So that it takes milliseconds, on any machine."""
    probe = "import sys, pretrain.plan; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
