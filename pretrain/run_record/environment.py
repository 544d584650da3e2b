"""environment.json of a run folder: on what, from which code and with which settings a start ran; never a secret.

Environment variables are kept by an allow-list. What looks like a secret is struck out even there, and in the command
line: values of options and variables with telling names, wherever they appear, passwords in addresses, known forms of
tokens.
"""

import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from data_prep.output_files import write_json_whole
from pretrain.config import ENVIRONMENT_FILE
from pretrain.run_record.run_logs import job_folder, job_name

PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "numpy", "psutil", "wandb")
KEPT_VARIABLES = (
    *(
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
        "HF_HUB_OFFLINE",
    ),
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_JOB_PARTITION"),
    *("SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME", "SLURM_CPUS_PER_TASK", "SLURM_ARRAY_TASK_ID"),
)
KEPT_PREFIXES = ("NCCL_", "NVTE_", "CUDA_", "CUBLAS_", "TORCH_NCCL_", "GLOO_")
HIDDEN = "[hidden]"
LEAST_SECRET_LENGTH = 6  # a shorter value would be struck out of words that happen to hold it
QUERY_SECONDS = 5
_SECRET_NAME = re.compile(
    r"(token|secret|passw(or)?d|credentials?|authorization|(api|access|private)[-_]?key)s?$", re.IGNORECASE
)
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,}|gh[pousr]_[A-Za-z0-9]{16,})")
_PASSWORD_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_PROJECT = Path(__file__).resolve().parents[2]


def write_environment(run_folder: Path) -> None:
    """Write environment.json, of the newest start, and a copy beside the start's logs. Never fails a run."""
    try:
        environment = describe_environment()
        write_json_whole(run_folder / ENVIRONMENT_FILE, environment)
        logs = job_folder(run_folder, job_name())
        if logs.is_dir():
            write_json_whole(logs / ENVIRONMENT_FILE, environment)
    except Exception as error:  # a description must not cost the run it describes
        print(f"warning: {run_folder / ENVIRONMENT_FILE}: not written: {error}", flush=True)


def describe_environment() -> dict[str, object]:
    """The facts, as JSON values; of the ranks, those that are known on this one."""
    import torch  # every rank has it already

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "job": job_name(),
        "command": shlex.join([sys.executable, *hide_secrets(sys.argv, os.environ)]),
        "revision": git_revision(),
        "changed_files": _changed_files(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "system": platform.platform(),
        "host": socket.gethostname(),
        "hosts": int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        "host_names": os.environ.get("SLURM_JOB_NODELIST", socket.gethostname()),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "variables": kept_variables(os.environ),
    }


def kept_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Those environment variables that change how a run runs, and are nobody's secret."""
    kept = {
        name: value
        for name, value in variables.items()
        if (name in KEPT_VARIABLES or name.startswith(KEPT_PREFIXES)) and not _SECRET_NAME.search(name)
    }
    return dict(
        zip(sorted(kept), hide_secrets([kept[name] for name in sorted(kept)], variables), strict=True)
    )


def hide_secrets(words: list[str], variables: Mapping[str, str]) -> list[str]:
    """`words` of a command line without what is secret in them, by its option's name, its form, or `variables`."""
    secrets = [
        value
        for name, value in variables.items()
        if _SECRET_NAME.search(name) and len(value) >= LEAST_SECRET_LENGTH
    ]
    shown = []
    option_before = ""
    for word in words:
        name, equals, _ = word.partition("=")
        if _SECRET_NAME.search(option_before) and not word.startswith("-"):
            word = HIDDEN
        elif equals and _SECRET_NAME.search(name):
            word = f"{name}={HIDDEN}"
        for secret in secrets:
            word = word.replace(secret, HIDDEN)
        shown.append(_PASSWORD_IN_ADDRESS.sub(HIDDEN, _SECRET_VALUE.sub(HIDDEN, word)))
        option_before = word if word.startswith("-") else ""
    return shown


def git_revision() -> str | None:
    """The commit of this code; None where it is no git checkout, or git is not there."""
    return _git("rev-parse", "HEAD")


def _changed_files() -> list[str] | None:
    """Tracked files that are not as committed; None where git cannot say."""
    answer = _git("status", "--porcelain", "--untracked-files=no")
    return None if answer is None else [line.split(maxsplit=1)[1] for line in answer.splitlines()]


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(_PROJECT), *arguments],
            capture_output=True,
            text=True,
            timeout=QUERY_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The NVIDIA driver's version, from where its kernel module tells it."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if re.fullmatch(r"\d+(\.\d+)+", word)), None)
