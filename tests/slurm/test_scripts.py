"""The job scripts start a launcher on every node and pass the user's flags on word for word.

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
    # The job runs no longer: somebody has cancelled it.
    "squeue": "echo CANCELLED None",
    # Prints each argument on a line of its own; asked for a recipe's run folder, it names one.
    "python": '[[ $1 != -c ]] || { echo runs/here && exit; }; printf "%s\\n" "$@"',
}
# Prints its options and the command, each on a line of its own.
PRINTING_SRUN = {"srun": 'printf "%s\\n" srun "$@"'}
JOB = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "RANKS_PER_NODE": "4",
}
AWKWARD = "two words; $(echo no) \"quoted\" 'too' *"


def _run_job(
    folder: Path, script: str, *arguments: str, stand_ins: dict[str, str] = STAND_INS, **environment: str
) -> subprocess.CompletedProcess[str]:
    for name, body in stand_ins.items():
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


def _said(job: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of the commands that the job has run, without those of the script itself."""
    assert job.returncode == 0, job.stderr
    return [line for line in job.stdout.splitlines() if f" job {JOB['SLURM_JOB_ID']}, " not in line]


@pytest.mark.parametrize("stage", ["idm", "policy"])
def test_training_starts_a_launcher_on_each_node(tmp_path: Path, stage: str) -> None:
    job = _run_job(
        tmp_path, f"pretrain_{stage}.sh", "--optimizer.learning-rate", "1e-4", "--run-folder", AWKWARD
    )
    assert _said(job) == [
        *("-m", "pretrain.launch", "--nodes", "2", "--node-rank", "1", "--ranks-per-node", "4"),
        *("--master", "n1:22345", f"configs/{stage}_llama31_8b.yaml", "--resume"),
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
    said = _said(job)
    assert said[:3] == ["data_prep/blend.py", "--config", "configs/blend_200g.yaml"]
    assert said[-3:] == ["--resume", "--output", AWKWARD]


def test_conversions_pass_flags_on(tmp_path: Path) -> None:
    job = _run_job(tmp_path, "convert_base.sh", "--precision", "bf16", BASE_MODEL=AWKWARD)
    assert _said(job) == [
        *("checkpoint_tools/hf_to_megatron.py", "--source", AWKWARD, "--output", "runs/llama31_8b/base"),
        *("--precision", "bf16"),
    ]
    job = _run_job(tmp_path, "export.sh", "--layout", "lamda-rl", EXPORT=AWKWARD)
    assert _said(job) == [
        *("checkpoint_tools/megatron_to_hf.py", "--run", "runs/llama31_8b/policy", "--output", AWKWARD),
        *("--layout", "lamda-rl"),
    ]


def test_the_environment_wins_over_the_site_file(tmp_path: Path) -> None:
    job = _run_job(tmp_path, "pretrain_idm.sh", IDM_RECIPE="configs/demo_idm.yaml")
    assert "configs/demo_idm.yaml" in _said(job)


def test_a_failing_command_fails_the_job(tmp_path: Path) -> None:
    job = _run_job(tmp_path, "pretrain_idm.sh", PYTHON="/bin/false")
    assert job.returncode != 0


@pytest.mark.parametrize("form", [("--container-image", AWKWARD), (f"--container-image={AWKWARD}",)])
@pytest.mark.parametrize(
    "script", ["tokenize.sh", "blend.sh", "convert_base.sh", "export.sh", "pretrain_idm.sh"]
)
def test_a_container_is_asked_of_srun(tmp_path: Path, script: str, form: tuple[str, ...]) -> None:
    """Every process runs in it; nothing of the option reaches the command."""
    stand_ins = STAND_INS | PRINTING_SRUN
    job = _run_job(
        tmp_path, script, *form, "--flag", "x", stand_ins=stand_ins, CONTAINER_MOUNTS="/a:/a,/b:/c"
    )
    calls = job.stdout.split("srun\n")[1:]
    assert calls
    container = (
        f"--container-image={AWKWARD}",
        "--container-mounts=/a:/a,/b:/c",
        f"--container-workdir={ROOT}",
    )
    for call in calls:
        lines = call.splitlines()
        command = lines.index("bash" if "bash" in lines else str(tmp_path / "python"))
        assert set(container) <= set(lines[:command])
        assert AWKWARD not in lines[command:] and "--container-image" not in lines[command:]
        assert "--flag\nx" in call
    outside = _run_job(tmp_path, script, "--flag", "x", stand_ins=stand_ins)
    assert "--container" not in outside.stdout


def test_in_a_container_its_own_python_is_meant(tmp_path: Path) -> None:
    environment = {"PYTHON": "", "CONTAINER_IMAGE": "site.sqsh"}
    job = _run_job(tmp_path, "blend.sh", stand_ins=STAND_INS | PRINTING_SRUN, **environment)
    assert "python3" in _said(job)


@pytest.mark.parametrize("arguments", [("--container-image",), ("--container-image", "")])
def test_a_container_without_an_image_is_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    job = _run_job(tmp_path, "blend.sh", *arguments)
    assert job.returncode == 2
    assert job.stderr.startswith("error: --container-image")


@pytest.mark.parametrize("script", [str(path) for path in tracked_files(".sh")])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
