"""The job scripts start torchrun on every node and pass the user's flags on word for word.

Slurm's own commands are replaced by small stand-ins on PATH; the job scripts are the shipped ones.
"""

import os
import subprocess
from pathlib import Path

import pytest

from data_prep.corpus_sources import SOURCES
from tests.repository_rules import ROOT, tracked_files

STAND_INS = {
    # Prints the nodes of the job, as `scontrol show hostnames` does.
    "scontrol": 'printf "n1\\nn2\\n"',
    # Runs its command once, as the task of the second node, without its own options.
    "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=1 exec "$@"',
    # Prints each argument on a line of its own.
    "python": 'printf "%s\\n" "$@"',
}
JOB = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "RANKS_PER_NODE": "4",
}
AWKWARD = "two words; $(echo no) \"quoted\" 'too' *"


def _run_job(
    folder: Path, script: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python")}
    return subprocess.run(
        ["bash", f"slurm/{script}", *arguments],
        cwd=ROOT,
        env=os.environ | path | JOB | {"SLURM_SUBMIT_DIR": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("stage", ["idm", "policy"])
def test_training_starts_torchrun_on_each_node(tmp_path: Path, stage: str) -> None:
    job = _run_job(
        tmp_path, f"pretrain_{stage}.sh", "--optimizer.learning-rate", "1e-4", "--run-folder", AWKWARD
    )
    assert job.returncode == 0, job.stderr
    assert job.stdout.splitlines() == [
        *("-m", "torch.distributed.run"),
        *("--nnodes=2", "--node-rank=1", "--nproc-per-node=4"),
        *("--master-addr=n1", "--master-port=22345"),
        *("-m", "pretrain.train", f"configs/{stage}_llama31_8b.yaml", "--resume"),
        *("--optimizer.learning-rate", "1e-4", "--run-folder", AWKWARD),
    ]


def test_tokenizing_takes_each_source(tmp_path: Path) -> None:
    flags = ("--decontaminate", AWKWARD)
    job = _run_job(tmp_path, "tokenize.sh", *flags, CORPORA="/corpora", SLURM_CPUS_PER_TASK="7")
    assert job.returncode == 0, job.stderr
    calls = job.stdout.split("data_prep/tokenize_corpus.py")[1:]
    inputs = [text.split("--input\n")[1].split("\n")[0] for text in calls]
    assert inputs == [f"/corpora/{source}" for source in SOURCES]
    assert all(text.endswith(f"--workers\n7\n--resume\n--decontaminate\n{AWKWARD}\n") for text in calls)


def test_blending_passes_flags_on(tmp_path: Path) -> None:
    job = _run_job(tmp_path, "blend.sh", "--output", AWKWARD)
    assert job.returncode == 0, job.stderr
    assert job.stdout.startswith("data_prep/blend.py\n--config\nconfigs/blend_200g.yaml\n")
    assert job.stdout.endswith(f"--resume\n--output\n{AWKWARD}\n")


def test_conversions_pass_flags_on(tmp_path: Path) -> None:
    job = _run_job(tmp_path, "convert_base.sh", "--precision", "bf16", BASE_MODEL=AWKWARD)
    assert job.stdout.splitlines() == [
        *("checkpoint_tools/hf_to_megatron.py", "--source", AWKWARD, "--output", "runs/llama31_8b/base"),
        *("--precision", "bf16"),
    ]
    job = _run_job(tmp_path, "export.sh", "--layout", "lamda-rl", EXPORT=AWKWARD)
    assert job.stdout.splitlines() == [
        *("checkpoint_tools/megatron_to_hf.py", "--run", "runs/llama31_8b/policy", "--output", AWKWARD),
        *("--layout", "lamda-rl"),
    ]


def test_the_environment_wins_over_the_site_file(tmp_path: Path) -> None:
    job = _run_job(tmp_path, "pretrain_idm.sh", IDM_RECIPE="configs/demo_idm.yaml")
    assert "configs/demo_idm.yaml" in job.stdout.splitlines()


def test_a_failing_command_fails_the_job(tmp_path: Path) -> None:
    job = _run_job(tmp_path, "pretrain_idm.sh", PYTHON="/bin/false")
    assert job.returncode != 0


@pytest.mark.parametrize("script", [str(path) for path in tracked_files(".sh")])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
