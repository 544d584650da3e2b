"""environment.json says what a start ran on; no secret of the environment or the command line is in the run folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.run_record import environment
from pretrain.run_record.environment import HIDDEN, hide_secrets, kept_variables, write_environment
from tests.pretrain.tiny_runs import tiny_recipe, train_in_process

CANARY = "canary-0123456789-0123456789-0123456789-x"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "NCCL_SECRET")


@pytest.fixture
def _canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, f"{CANARY}{name}")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", f"eth0,{CANARY}HF_TOKEN")  # one that strayed
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(sys, "argv", ["train.py", "r.yaml", "--hub.token", f"{CANARY}argument", "--resume"])


@pytest.fixture
def trained(tmp_path: Path, tiny_blend: Path, _canaries: None) -> Path:
    """A run with all that it writes, wandb's files too."""
    run = tmp_path / "run"
    (run / "logs" / "12.0").mkdir(parents=True)
    recipe = tiny_recipe("base", run, tiny_blend, training={"steps": 1}, logging={"wandb": "offline"})
    train_in_process(recipe)
    write_environment(run)
    return run


def with_canary(folder: Path) -> list[str]:
    """Files of `folder` that hold a secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path.name for path in files if CANARY.encode() in path.read_bytes()]


def test_no_secret_is_in_the_run_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the search would find one: without the hiding it is there."""
    assert with_canary(trained) == []
    assert list(trained.glob("wandb/offline-run-*/*.wandb"))
    facts = json.loads((trained / "environment.json").read_text())
    assert facts["command"].endswith(f"train.py r.yaml --hub.token '{HIDDEN}' --resume")
    assert facts["variables"]["NCCL_DEBUG"] == "WARN"
    assert facts["variables"]["NCCL_SOCKET_IFNAME"] == f"eth0,{HIDDEN}"
    assert not set(SECRETS) & set(facts["variables"])
    monkeypatch.setattr(environment, "hide_secrets", lambda words, variables: words)
    write_environment(trained)
    assert with_canary(trained) == ["environment.json", "environment.json"]


def test_it_says_on_what_and_from_which_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    (tmp_path / "logs" / "12.3").mkdir(parents=True)
    write_environment(tmp_path)
    facts = json.loads((tmp_path / "environment.json").read_text())
    import torch

    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["megatron-core"]
    assert (facts["job"], facts["hosts"], facts["host_names"], facts["ranks"]) == ("12.3", 2, "n[1-2]", 16)
    answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    assert facts["revision"] == (answer.stdout.strip() or None)
    assert json.loads((tmp_path / "logs" / "12.3" / "environment.json").read_text()) == facts


def test_a_folder_that_takes_no_file_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_environment(tmp_path / "missing")
    assert "warning: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--token", "abc", "x"], ["--token", HIDDEN, "x"]),
        (["--api-key=abc"], [f"--api-key={HIDDEN}"]),
        (["--wandb.api_key", "abc"], ["--wandb.api_key", HIDDEN]),
        (["--password", "--resume"], ["--password", "--resume"]),
        (["https://me:pass@host/x"], [f"https://{HIDDEN}@host/x"]),
        (["--path", "hf_" + "a" * 30], ["--path", HIDDEN]),
        (["say-sesame-12"], [f"say-{HIDDEN}"]),
        (["--model.num-key-value-heads", "8"], ["--model.num-key-value-heads", "8"]),
        (["--data.total-tokens-seen", "100"], ["--data.total-tokens-seen", "100"]),
        (["--actions.regulariser", "token"], ["--actions.regulariser", "token"]),
    ],
)
def test_what_is_hidden_in_a_command_line(words: list[str], shown: list[str]) -> None:
    """Secrets by name, by form, and by what the environment calls a secret; nothing of an ordinary recipe."""
    assert hide_secrets(words, {"DOOR_PASSWORD": "sesame-12", "PATH": "x"}) == shown


def test_variables_are_kept_by_an_allow_list() -> None:
    variables = {"OMP_NUM_THREADS": "4", "NVTE_FLASH_ATTN": "1", "HOME": "somewhere", "CUDA_API_TOKEN": "abc"}
    assert kept_variables(variables) == {"NVTE_FLASH_ATTN": "1", "OMP_NUM_THREADS": "4"}
