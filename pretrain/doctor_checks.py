"""What the doctor looks at, and every trap it knows: pure functions from the facts of a machine to findings.

Nothing heavier than the standard library is imported at the top: where a package is missing, that is the finding.
"""

import importlib
import importlib.metadata
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.backends import Backends
    from pretrain.config import RunConfig

NEEDED = {
    "torch": "computes",
    "megatron-core": "layers, parallelism, checkpoints",
    "psutil": "without it Megatron's checkpoint writer waits for ever",
    "numpy": "data",
    "pydantic": "recipes",
    "PyYAML": "recipes",
    "tyro": "command line",
    "tqdm": "progress",
    "xxhash": "checksums",
}
TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine_torch", "transformer_engine_cu13",
                      "transformer_engine_cu12")  # fmt: skip
# From, and below: what megatron-core 0.16.1 itself asks for.
TRANSFORMER_ENGINE_RANGE = ((2, 9), (2, 12))
REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
LEAST_PYTHON = (3, 11)
LEAST_OPEN_FILES = 1024
LEAST_SHARED_MEMORY_GIB = 1.0
QUERY_TIMEOUT_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be."""

    stops: bool
    """Training cannot run; else a warning."""
    text: str
    """What is wrong, and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What can be seen without importing any package."""

    python: tuple[int, int]
    versions: dict[str, str]
    """Installed packages that matter, by name."""
    pins: dict[str, str] = field(default_factory=dict)
    """Versions in requirements.txt, which the tests run with."""
    nvidia_gpus: tuple[str, ...] = ()
    """GPUs as the NVIDIA driver names them, with memory and driver version."""
    cores: int
    open_files: int
    """Soft limit of open files."""
    shared_memory_gib: float
    """Size of /dev/shm."""
    threads: int | None
    """OMP_NUM_THREADS; None where unset."""
    local_ranks: int
    """Ranks on this machine: as torchrun says, else one a GPU, at least one."""
    max_connections: str | None = None
    """CUDA_DEVICE_MAX_CONNECTIONS."""


def look_at_machine() -> Machine:
    """The facts of this machine."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    gpus = _ask_nvidia_smi()
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    return Machine(
        python=sys.version_info[:2],
        versions={
            name: version
            for name in (*NEEDED, *TRANSFORMER_ENGINE)
            if (version := _version_of(name)) is not None
        },
        pins=_read_pins(),
        nvidia_gpus=gpus,
        cores=len(os.sched_getaffinity(0)),
        open_files=sys.maxsize if open_files == resource.RLIM_INFINITY else open_files,
        shared_memory_gib=shared / 2**30,
        threads=int(threads) if threads.isdecimal() else None,
        local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", max(len(gpus), 1))),
        max_connections=os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
    )


def find_package_traps(machine: Machine) -> Iterator[Finding]:
    """Missing packages and versions that do not fit."""
    if machine.python < LEAST_PYTHON:
        yield Finding(stops=True, text=f"Python {dotted(machine.python)}: 3.11 or later is needed")
    missing = [name for name in NEEDED if name not in machine.versions]
    for name in missing:
        yield Finding(
            stops=True, text=f"{name}: not installed ({NEEDED[name]}); pip install -r requirements.txt"
        )
    for name in NEEDED:
        found, pinned = machine.versions.get(name, "").split("+")[0], machine.pins.get(name)
        if found and pinned and found != pinned:
            yield Finding(stops=False, text=f"{name}: {found}, but the tests run with {pinned}")
    engine = {name: machine.versions[name] for name in TRANSFORMER_ENGINE if name in machine.versions}
    if len(set(engine.values())) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in engine.items())
        yield Finding(
            stops=False, text=f"Transformer Engine's packages differ ({listed}): install one version of all"
        )
    from_version, below = TRANSFORMER_ENGINE_RANGE
    version = engine.get("transformer_engine")
    if version is not None and not from_version <= _leading_numbers(version) < below:
        yield Finding(
            stops=False,
            text=f"transformer_engine: {version} is outside megatron-core's range, {dotted(from_version)} to below "
            f"{dotted(below)}; requirements-gpu.txt names one inside",
        )


def find_machine_traps(machine: Machine, backends: "Backends") -> Iterator[Finding]:
    """Limits and settings that break a run or slow it down."""
    from pretrain.backends import find_machine_problems

    for problem in find_machine_problems(backends):
        yield Finding(stops=True, text=problem)
    if machine.nvidia_gpus and not backends.cuda:
        reason = (
            "torch is a CPU build; install PyPI's torch, without an index of CPU builds"
            if backends.cuda_version is None
            else f"torch, built for CUDA {dotted(backends.cuda_version)}, cannot use them; the driver may be too old, "
            "or CUDA_VISIBLE_DEVICES hides them"
        )
        yield Finding(
            stops=False,
            text=f"{len(machine.nvidia_gpus)} GPU(s), but training would run on the CPU: {reason}",
        )
    if machine.open_files < LEAST_OPEN_FILES:
        yield Finding(
            stops=False,
            text=f"open files: limit {machine.open_files}, and loader and checkpoint processes need many; "
            "ulimit -n 65536",
        )
    if machine.threads is not None and machine.threads * machine.local_ranks > machine.cores:
        yield Finding(
            stops=False,
            text=f"OMP_NUM_THREADS: {machine.threads} threads x {machine.local_ranks} rank(s) on {machine.cores} "
            f"core(s) get into each other's way; OMP_NUM_THREADS={max(machine.cores // machine.local_ranks, 1)}",
        )
    if backends.cuda and machine.shared_memory_gib < LEAST_SHARED_MEMORY_GIB:
        yield Finding(stops=False, text=_shared_memory_text(machine))


def find_recipe_traps(config: "RunConfig", machine: Machine, backends: "Backends") -> Iterator[Finding]:
    """What in `config` is wrong whatever the number of ranks, and what this machine cannot do of it."""
    from pretrain.backends import find_backend_problems, find_machine_problems
    from pretrain.config_checks import find_problems

    parallel = config.parallel
    # On the fewest ranks: whatever is wrong there is wrong on any number of data-parallel ranks.
    ranks = max(parallel.tensor_parallel_size * parallel.pipeline_parallel_size, 1)
    told = find_machine_problems(backends)  # those stand in the list already
    problems = [*find_problems(config, ranks), *find_backend_problems(config, backends)]
    for problem in problems:
        if problem not in told:
            yield Finding(stops=True, text=problem)
    if (
        not backends.cuda
        and config.data.loader_workers > 0
        and machine.shared_memory_gib < LEAST_SHARED_MEMORY_GIB
    ):
        yield Finding(stops=False, text=_shared_memory_text(machine))
    if backends.cuda and parallel.tensor_parallel_size > backends.device_count:
        yield Finding(
            stops=False,
            text=f"parallel.tensor_parallel_size: {parallel.tensor_parallel_size} ranks, but this node has "
            f"{backends.device_count} GPU(s): layers would be shared across the network, which is slow",
        )
    if backends.cuda and parallel.tensor_parallel_size > 1 and machine.max_connections != "1":
        yield Finding(
            stops=False,
            text="CUDA_DEVICE_MAX_CONNECTIONS: is not 1; before Blackwell, tensor parallelism overlaps its "
            "communication only with export CUDA_DEVICE_MAX_CONNECTIONS=1",
        )


def find_import_trap(module: str) -> Iterator[Finding]:
    """Whether `module` imports; Megatron's as the trainer imports it, which takes some ten seconds."""
    try:
        if module != "torch":
            cpu_redirects = importlib.import_module("pretrain.cpu_redirects")
            cpu_redirects.apply()
        importlib.import_module(module)
    except Exception as error:  # whatever it is, it is the finding
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield Finding(
            stops=True, text=f"{module}: does not import ({text}); pip install -r requirements.txt anew"
        )


def _shared_memory_text(machine: Machine) -> str:
    return (
        f"/dev/shm: {machine.shared_memory_gib:.2f} GiB, through which loader processes and NCCL pass data; "
        "docker run --shm-size=8g, or --ipc=host"
    )


def _ask_nvidia_smi() -> tuple[str, ...]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=QUERY_TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(
        f"{line.strip()} (name, memory, driver)" for line in answer.stdout.splitlines() if line.strip()
    )


def _read_pins() -> dict[str, str]:
    if not REQUIREMENTS.is_file():
        return {}
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", REQUIREMENTS.read_text(), flags=re.MULTILINE))


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _leading_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def dotted(version: tuple[int, ...]) -> str:
    """(12, 9) as 12.9."""
    return ".".join(str(number) for number in version)
