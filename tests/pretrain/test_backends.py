"""What a machine offers decides what a run uses and what is refused; foreign packages are told from NVIDIA's."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.backends import Backends, find_apex, find_backend_problems, find_backends, find_machine_problems
from pretrain.config import RunConfig
from tests.pretrain.tiny_runs import tiny_recipe

CPU = Backends()
HOPPER = Backends(
    cuda=True,
    device_name="H100",
    device_count=8,
    compute_capability=(9, 0),
    device_memory_gib=79.0,
    cuda_version=(13, 0),
    nccl="2.28.9",
    transformer_engine="2.11.0",
)
AMPERE = replace(HOPPER, device_name="A100", compute_capability=(8, 0))
TURING = replace(HOPPER, device_name="T4", compute_capability=(7, 5), transformer_engine=None)
FP8_FIELDS = ("fp8", "base_fp8")


def recipe(**training: object) -> RunConfig:
    return tiny_recipe("base", Path("run"), Path("data"), training={"precision": "bf16", **training})


@pytest.mark.parametrize(
    ("backends", "expected"),
    [
        (CPU, ("gloo", "local", "scaled_dot_product_attention", "torch", ())),
        (
            HOPPER,
            (
                "nccl",
                "transformer_engine",
                "transformer_engine",
                "transformer_engine",
                ("tensorwise", "delayed", "blockwise"),
            ),
        ),
        (AMPERE, ("nccl", "transformer_engine", "transformer_engine", "transformer_engine", ())),
        (
            replace(HOPPER, transformer_engine=None, apex="nvidia"),
            ("nccl", "local", "scaled_dot_product_attention", "apex", ()),
        ),
        (
            replace(HOPPER, transformer_engine=None),
            ("nccl", "local", "scaled_dot_product_attention", "torch", ()),
        ),
        (replace(CPU, apex="nvidia"), ("gloo", "local", "scaled_dot_product_attention", "torch", ())),
    ],
)
def test_what_is_there_decides_what_is_used(backends: Backends, expected: tuple[object, ...]) -> None:
    used = (backends.collectives, backends.layer_spec, backends.attention, backends.fused_optimizer)
    assert (*used, backends.fp8_recipes) == expected


def test_blockwise_also_asks_for_the_toolkit() -> None:
    older = replace(HOPPER, cuda_version=(12, 8))
    assert older.fp8_recipes == ("tensorwise", "delayed")
    assert find_backend_problems(recipe(fp8="blockwise"), older) == [
        "training.fp8: blockwise needs a torch built with CUDA 12.9 or later; this one has 12.8; "
        "else set training.fp8 off"
    ]
    assert not find_backend_problems(recipe(fp8="blockwise"), HOPPER)


@pytest.mark.parametrize("name", FP8_FIELDS)
@pytest.mark.parametrize(
    ("backends", "why"),
    [
        (
            CPU,
            "tensorwise needs a GPU of compute capability 9.0 or more and Transformer Engine; torch sees no GPU",
        ),
        (AMPERE, "tensorwise needs a GPU of compute capability 9.0 or more; A100 has 8.0"),
        (
            replace(HOPPER, transformer_engine=None),
            "tensorwise needs Transformer Engine, which is not usable here",
        ),
    ],
)
def test_fp8_is_refused_where_it_cannot_run(name: str, backends: Backends, why: str) -> None:
    (problem,) = find_backend_problems(recipe(**{name: "tensorwise"}), backends)
    assert problem.startswith(f"training.{name}: {why}")
    assert problem.endswith(f"set training.{name} off")
    assert not find_backend_problems(recipe(), backends)


def test_both_fp8_fields_are_reported_at_once() -> None:
    problems = find_backend_problems(recipe(fp8="tensorwise", base_fp8="tensorwise"), CPU)
    assert [problem.split(":")[0] for problem in problems] == ["training.fp8", "training.base_fp8"]


def test_bf16_needs_ampere_on_a_gpu_and_nothing_on_a_cpu() -> None:
    (problem,) = find_backend_problems(recipe(), TURING)
    assert problem.startswith(
        "training.precision: bf16 needs a GPU of compute capability 8.0 or more; T4 has 7.5"
    )
    assert not find_backend_problems(recipe(precision="fp32"), TURING)
    assert not find_backend_problems(recipe(), CPU)


@pytest.mark.parametrize(
    ("backends", "start"),
    [
        (replace(CPU, apex="foreign", apex_location="/x/apex"), "apex: /x/apex is not NVIDIA's"),
        (replace(HOPPER, apex="foreign", apex_location="/x/apex"), "apex: /x/apex is not NVIDIA's"),
        (replace(HOPPER, apex="incomplete", apex_location="/x/apex"), "apex: /x/apex was built without"),
        (replace(HOPPER, transformer_engine_error="OSError: x"), "transformer_engine: is installed but"),
        (replace(HOPPER, nccl=None), "nccl: "),
    ],
)
def test_a_broken_machine_is_named(backends: Backends, start: str) -> None:
    (problem,) = find_machine_problems(backends)
    assert problem.startswith(start)
    assert problem in find_backend_problems(recipe(), backends)


@pytest.mark.parametrize("backends", [CPU, HOPPER, AMPERE, replace(HOPPER, apex="nvidia")])
def test_a_sound_machine_is_left_alone(backends: Backends) -> None:
    assert not find_machine_problems(backends)


APEX_FILES = {
    "foreign": ["apex/__init__.py", "apex/models.py"],
    "foreign, a source tree": ["apex/apex/optimizers/fused_adam.py", "apex/setup.py"],
    "foreign, one file": ["apex.py"],
    "incomplete": ["apex/__init__.py", "apex/optimizers/fused_adam.py"],
    "nvidia": ["apex/__init__.py", "apex/optimizers/fused_adam.py", "amp_C.py"],
    "none": [],
}


@pytest.mark.parametrize("kind", APEX_FILES)
def test_kinds_of_apex(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file would fail if it were run."""
    for name in APEX_FILES[kind]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise AssertionError('was executed')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    found, location = find_apex()
    assert found == kind.split(",")[0]
    assert (location is None) == (kind == "none")


def test_looking_imports_neither_megatron_nor_transformer_engine() -> None:
    """On a machine without CUDA; in a process of its own, since this one has Megatron loaded."""
    script = (
        "import sys; from pretrain.backends import find_backends; backends = find_backends(); "
        "print(backends.cuda, 'megatron' in sys.modules, 'transformer_engine' in sys.modules)"
    )
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path.cwd()), "PATH": ""}
    answer = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == ["False", "False", "False"]


def test_this_machine_agrees_with_torch() -> None:
    import torch

    backends = find_backends()
    assert backends.cuda == torch.cuda.is_available()
    assert (backends.compute_capability is None) == (not backends.cuda)
    assert backends.cuda or not backends.fp8_recipes
