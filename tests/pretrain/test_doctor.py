"""The doctor finds each trap, names its remedy, is silent where all is well, and its exit code says what counts."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.backends import Backends
from pretrain.doctor import main
from pretrain.doctor_checks import (
    NEEDED,
    Finding,
    Machine,
    find_import_trap,
    find_machine_traps,
    find_package_traps,
    find_recipe_traps,
    look_at_machine,
)
from tests.command_lines import run_here
from tests.pretrain.test_backends import CPU, HOPPER
from tests.pretrain.tiny_runs import tiny_recipe
from tests.repository_rules import ROOT

VERSIONS = dict.fromkeys(NEEDED, "1.0")
SOUND = Machine(
    python=(3, 11),
    versions=VERSIONS,
    pins=VERSIONS,
    cores=16,
    open_files=65536,
    shared_memory_gib=32.0,
    threads=None,
    local_ranks=1,
)
GPU_NODE = replace(SOUND, nvidia_gpus=("H100",) * 8, local_ranks=8)
ENGINE = {"transformer_engine": "2.11.0", "transformer_engine_torch": "2.11.0"}


def texts(findings: Iterator[Finding], stops: bool) -> list[str]:
    return [finding.text for finding in findings if finding.stops == stops]


@pytest.mark.parametrize(("machine", "backends"), [(SOUND, CPU), (GPU_NODE, HOPPER)])
def test_a_sound_machine_has_no_findings(machine: Machine, backends: Backends) -> None:
    assert not list(find_package_traps(machine))
    assert not list(find_machine_traps(machine, backends))


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_package_stops(name: str) -> None:
    versions = {other: version for other, version in VERSIONS.items() if other != name}
    (text,) = texts(find_package_traps(replace(SOUND, versions=versions)), stops=True)
    assert text.startswith(f"{name}: not installed ({NEEDED[name]})")


def test_an_old_python_stops() -> None:
    assert texts(find_package_traps(replace(SOUND, python=(3, 10))), stops=True)


def test_other_versions_than_the_pinned_ones_warn() -> None:
    other = replace(SOUND, versions=VERSIONS | {"torch": "1.1+cu130"})
    assert texts(find_package_traps(other), stops=False) == ["torch: 1.1, but the tests run with 1.0"]
    same = replace(SOUND, versions=VERSIONS | {"torch": "1.0+cu130"})
    assert not list(find_package_traps(same))


@pytest.mark.parametrize(
    ("engine", "start"),
    [
        (ENGINE, None),
        (ENGINE | {"transformer_engine_cu13": "2.10.0"}, "Transformer Engine's packages differ"),
        ({"transformer_engine": "2.12.0"}, "transformer_engine: 2.12.0 is outside"),
        ({"transformer_engine": "2.8.0"}, "transformer_engine: 2.8.0 is outside"),
        ({"transformer_engine": "2.9.0.dev1"}, None),
    ],
)
def test_versions_of_transformer_engine(engine: dict[str, str], start: str | None) -> None:
    found = texts(find_package_traps(replace(SOUND, versions=VERSIONS | engine)), stops=False)
    assert len(found) == (start is not None)
    assert start is None or found[0].startswith(start)


@pytest.mark.parametrize(
    ("machine", "backends", "words"),
    [
        (GPU_NODE, CPU, "torch is a CPU build"),
        (GPU_NODE, replace(CPU, cuda_version=(13, 0)), "built for CUDA 13.0, cannot use them"),
        (replace(SOUND, open_files=256), CPU, "ulimit -n 65536"),
        (replace(SOUND, threads=8, local_ranks=4), CPU, "OMP_NUM_THREADS=4"),
        (replace(GPU_NODE, shared_memory_gib=0.0625), HOPPER, "--shm-size"),
    ],
)
def test_limits_and_settings_warn(machine: Machine, backends: Backends, words: str) -> None:
    (text,) = texts(find_machine_traps(machine, backends), stops=False)
    assert words in text


def test_what_breaks_every_run_stops() -> None:
    foreign = replace(CPU, apex="foreign", apex_location="/x/apex")
    (text,) = texts(find_machine_traps(SOUND, foreign), stops=True)
    assert "pip uninstall apex" in text


def test_a_recipe_is_held_against_the_machine() -> None:
    folder = Path("run")
    fp8 = {"precision": "bf16", "fp8": "tensorwise"}
    sizes = {"hidden_size": 64, "head_size": 16}
    config = tiny_recipe("base", folder, folder, training=fp8, model=sizes)
    (text,) = texts(find_recipe_traps(config, SOUND, CPU), stops=True)
    assert text.startswith("training.fp8: tensorwise needs a GPU")
    assert not list(find_recipe_traps(config, GPU_NODE, HOPPER))
    wrong = tiny_recipe("base", folder, folder, training={"steps": -1})
    assert texts(find_recipe_traps(wrong, SOUND, CPU), stops=True)


def test_what_stops_every_run_is_said_once() -> None:
    foreign = replace(CPU, apex="foreign", apex_location="/x/apex")
    assert not list(find_recipe_traps(tiny_recipe("base", Path("run"), Path("data")), SOUND, foreign))


def test_tensor_parallelism_beyond_a_node_warns() -> None:
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 64, "head_size": 4}
    parallel = {"tensor_parallel_size": 16}
    config = tiny_recipe("base", Path("run"), Path("data"), model=sizes, parallel=parallel)
    tuned = replace(GPU_NODE, max_connections="1")
    (text,) = [finding.text for finding in find_recipe_traps(config, tuned, HOPPER)]
    assert text.startswith("parallel.tensor_parallel_size: 16 ranks, but this node has 8 GPU(s)")
    found = texts(find_recipe_traps(config, GPU_NODE, HOPPER), stops=False)
    assert [line.split(":")[0] for line in found] == [
        "parallel.tensor_parallel_size",
        "CUDA_DEVICE_MAX_CONNECTIONS",
    ]


def test_loader_processes_need_shared_memory() -> None:
    config = tiny_recipe("base", Path("run"), Path("data"), data={"loader_workers": 2})
    small = replace(SOUND, shared_memory_gib=0.0625)
    (text,) = texts(find_recipe_traps(config, small, CPU), stops=False)
    assert text.startswith("/dev/shm: 0.06 GiB")
    assert not list(find_recipe_traps(config, SOUND, CPU))


def test_a_module_that_does_not_import_stops() -> None:
    (text,) = texts(find_import_trap("no_such_module"), stops=True)
    assert text.startswith("no_such_module: does not import (ModuleNotFoundError")
    assert not list(find_import_trap("megatron.core.models.gpt"))


def test_this_machine_is_seen() -> None:
    machine = look_at_machine()
    assert machine.python == sys.version_info[:2]
    assert set(NEEDED) <= set(machine.versions)
    assert set(NEEDED) <= set(machine.pins)
    assert machine.cores > 0


def test_exit_codes() -> None:
    """Sound: 0. A recipe with more than one fault: 2, every fault named, and one line on stderr."""
    command = [sys.executable, "-m", "pretrain.doctor", "configs/demo_idm.yaml"]
    sound = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (sound.returncode, sound.stderr) == (0, "")
    assert "configs/demo_idm.yaml can run here" in sound.stdout
    sick = run_here(main, "configs/demo_idm.yaml", "--training.fp8", "tensorwise", "--training.steps", "0")
    assert sick.returncode == 2
    assert sick.stderr.startswith("error: ") and sick.stderr.count("\n") == 1
    said = " ".join(sick.stdout.split())
    assert "training.steps: must be positive" in said and "needs training.precision bf16" in said


def test_usage() -> None:
    assert "RECIPE.yaml" in run_here(main, "--help").stdout
    assert run_here(main, "--fast").stderr.startswith("error: usage: pretrain.doctor [RECIPE.yaml")
    assert run_here(main, "nothing.yaml").returncode == 2
