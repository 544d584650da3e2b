"""Where and with what a demo was run: machine, versions, durations and recipes, for the end of the report."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError

from data_prep.errors import UserError
from evaluation.run_metrics import RunMetrics

PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "numpy", "nltk")
STEPS_FILE = "steps.json"
CPU_INFO, MEMORY_INFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
KIB_PER_GIB = 1024**2


class _Step(BaseModel):
    name: str
    status: str
    seconds: float


class _Steps(BaseModel):
    steps: list[_Step]


def machine_facts() -> dict[str, str]:
    """Processor, cores, memory and system of this machine; what the system does not tell is left out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"processor": _processor(), "cores usable": str(cores), "system": platform.platform(terse=True)}
    if MEMORY_INFO.is_file():
        kib = int(MEMORY_INFO.read_text().split("MemTotal:")[1].split()[0])
        facts["memory"] = f"{kib / KIB_PER_GIB:.0f} GiB"
    return facts


def _processor() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version_facts() -> dict[str, str]:
    """Versions of Python and of the packages that matter for the figures."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an export can be evaluated where it was not trained
    return versions


def step_seconds(demo_folder: Path) -> dict[str, float]:
    """Seconds of each finished step from the demo's own `steps.json`; empty where it was run by hand."""
    path = demo_folder / STEPS_FILE
    if not path.is_file():
        return {}
    try:
        steps = _Steps.model_validate_json(path.read_bytes()).steps
    except ValidationError as error:
        raise UserError(f"{path}: not readable ({error.errors()[0]['msg']}); run the demo anew") from None
    return {step.name: step.seconds for step in steps if step.status == "finished"}


def stage_seconds(runs: Mapping[str, RunMetrics]) -> dict[str, float]:
    """Training seconds of each stage that logged them."""
    return {stage: seconds for stage, run in runs.items() if (seconds := run.seconds()) is not None}


def run_configs(runs: Mapping[str, RunMetrics]) -> dict[str, str]:
    """Text of each run's resolved `config.yaml`, where it lies beside the metrics."""
    paths = {stage: run.path.with_name("config.yaml") for stage, run in runs.items()}
    return {stage: path.read_text(encoding="utf-8") for stage, path in paths.items() if path.is_file()}
