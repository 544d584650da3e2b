"""The status of a run is told from its folder alone: progress, speed, what happened, and whether it goes on."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.checksum_list import list_whole_folder
from data_prep.errors import UserError
from pretrain.recipes import dump_recipe
from pretrain.run_record.history import Fact
from pretrain.run_record.run_status import RunStatus, read_status
from pretrain.status import StatusOptions, show, status_page
from tests.pretrain.tiny_runs import SEQUENCE_LENGTH, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
TOKENS_PER_STEP = 8 * SEQUENCE_LENGTH


class FakeRun:
    """A run folder, filled an event at a time; times are seconds since its first start, which was an hour ago."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.began = time.time() - 3600
        folder.mkdir()
        recipe = tiny_recipe("idm", folder, folder / "data", folder / "base", training={"steps": 100})
        (folder / "config.yaml").write_text(dump_recipe(recipe))

    def event(self, at: float, event: str, **facts: Fact) -> None:
        """A line of history."""
        self._append(self.folder / "history.jsonl", {"event": event, "time": self.began + at, **facts})

    def launch(self, at: float, job: str, pid: int = 1, host: str = "elsewhere") -> None:
        """A launcher starts ranks."""
        self._launcher_line(at, "launch", job, ranks=2, host=host, pid=pid)

    def exit(self, at: float, job: str, code: int, reason: str) -> None:
        """Its ranks have ended."""
        self._launcher_line(at, "exit", job, exit_code=code, reason=reason)

    def trained(self, steps: range, tokens_per_second: float) -> None:
        """A line of metrics a step."""
        for step in steps:
            line = {"step": step, "stage": "idm", "split": "train", "loss": 10 - step / 100}
            speed = {"consumed_tokens": step * TOKENS_PER_STEP, "tokens_per_second": tokens_per_second}
            self._append(self.folder / "metrics.jsonl", line | speed)

    def saved(self, at: float, step: int) -> Path:
        """A checkpoint."""
        checkpoint = self.folder / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "cola.json").write_text("{}")
        list_whole_folder(checkpoint)
        self.event(at, "saved", step=step, blocked_seconds=0.1, seconds=1.0, bytes=2)
        return checkpoint

    def written(self, at: float) -> None:
        """Give all files this time, as if nothing was written since."""
        for path in [path for path in self.folder.rglob("*") if path.is_file()]:
            os.utime(path, (self.began + at, self.began + at))

    def _launcher_line(self, at: float, event: str, job: str, **facts: Fact) -> None:
        path = self.folder / "logs" / job / "launches.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._append(path, {"event": event, "time": self.began + at, "job": job, **facts})

    @staticmethod
    def _append(path: Path, line: dict[str, object]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    """Killed in its first start after step 40 of 100, its second start still at work at step 60."""
    run = FakeRun(tmp_path / "run")
    run.launch(0, "7.0")
    run.event(10, "start", from_step=0, lost_steps=0, ranks=2, job="7")
    run.event(
        12, "training", import_seconds=5.0, groups_seconds=1.0, load_seconds=3.0, first_step_seconds=1.0
    )
    run.event(500, "save_failed", step=20, reason="disk full")
    run.saved(600, 30)
    run.exit(1000, "7.0", 137, "rank 1 was killed by SIGKILL (exit code 137)")
    run.launch(1200, "7.1")
    run.event(1210, "start", from_step=30, lost_steps=10, ranks=2, job="7")
    run.event(
        1212, "training", import_seconds=6.0, groups_seconds=1.0, load_seconds=4.0, first_step_seconds=1.0
    )
    run.event(1300, "bad_step", step=33, reason="loss is nan", action="skipped")
    run.event(1400, "bad_step", step=50, reason="loss is nan", action="rolled_back")
    run.event(1401, "rolled_back", step=50, to_step=30)
    run.event(1402, "fell_back", step=40, reason="a bit", to_step=30)
    run.trained(range(1, 61), tokens_per_second=TOKENS_PER_STEP / 12)  # 12 seconds a step
    return run


def page_of(status: RunStatus) -> str:
    """The page as text."""
    console = Console(width=160, no_color=True)
    with console.capture() as captured:
        console.print(status_page(status))
    return captured.get()


def test_a_run_at_work(run: FakeRun) -> None:
    status = read_status(run.folder)
    assert (status.stage, status.state, status.step, status.total_steps) == ("idm", "running", 60, 100)
    assert status.consumed_tokens == 60 * TOKENS_PER_STEP
    assert status.loss == pytest.approx(9.4) and status.validation_loss is None
    assert status.tokens_per_second == pytest.approx(TOKENS_PER_STEP / 12)
    assert status.eta_seconds == pytest.approx(40 * 12)
    assert status.effective_time_ratio == pytest.approx(60 * 12 / 3600, rel=0.01)
    assert status.lost_steps == 10
    assert vars(status.troubles) == {
        "failed_saves": 1,
        "skipped_steps": 1,
        "rolled_back_steps": 1,
        "fallbacks": 1,
    }
    assert status.start_up_seconds == {"import": 6.0, "groups": 1.0, "load": 4.0, "first_step": 1.0}
    assert status.checkpoint is not None and (status.checkpoint.step, status.checkpoint.verified) == (
        30,
        False,
    )
    first, second = status.starts
    assert (first.exit_code, first.saved, first.from_step) == (137, 1, 0)
    assert (second.exit_code, second.saved, second.from_step, second.lost_steps) == (None, 0, 30, 10)
    assert status.logs == str(run.folder / "logs" / "7.1")


def test_the_page_shows_it_all(run: FakeRun) -> None:
    page = page_of(read_status(run.folder))
    for words in (
        *(
            "running",
            "60 of 100",
            "60.0%",
            "9.4000",
            "0:08:00 to go",
            "step 30,",
            "10 lost steps",
            "1 failed saves",
        ),
        *(
            "20.0% of the time",
            "load 4.0 s",
            "rank 1 was killed by SIGKILL",
            "from step 30, 10 steps lost",
            "7.1",
        ),
    ):
        assert words in page


def test_lines_that_are_being_written_are_left_out(run: FakeRun) -> None:
    before = read_status(run.folder)
    for name in ("metrics.jsonl", "history.jsonl", "logs/7.1/launches.jsonl"):
        with (run.folder / name).open("a") as file:
            file.write('{"event": "start", "step": 61, "ti')
    after = read_status(run.folder)
    assert (after.step, len(after.starts)) == (before.step, len(before.starts))


def test_states(run: FakeRun) -> None:
    """By what was noted last; where nothing was, by how long nothing was written."""
    run.written(at=1500)
    silent = read_status(run.folder)
    assert silent.state == "failed"
    assert silent.effective_time_ratio == pytest.approx(60 * 12 / 1500, rel=0.01)
    assert "no end was noted" in silent.why
    for at, (code, state) in enumerate([(75, "stopped"), (6, "failed"), (137, "failed"), (0, "finished")]):
        run.exit(1600 + at, "7.1", code, "words")
        assert read_status(run.folder).state == state


def test_a_launcher_on_this_machine_is_looked_for(run: FakeRun) -> None:
    code = "import time; print('up', flush=True); time.sleep(60)  # launch"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    run.launch(2000, "7.2", pid=process.pid, host=socket.gethostname())
    run.written(at=2000)
    assert read_status(run.folder).state == "running"
    process.kill()
    process.communicate()
    assert "was killed" in read_status(run.folder).why


def test_the_history_has_the_better_words(run: FakeRun) -> None:
    """Those of the training's own error, where its code is the one that the launcher saw."""
    run.event(1600, "end", step=60, exit_code=6, reason="too many bad steps")
    run.exit(1601, "7.1", 6, "rank 0 ended with exit code 6")
    assert read_status(run.folder).starts[-1].reason == "too many bad steps"
    run.launch(1700, "7.2")
    run.event(1710, "end", step=60, exit_code=1, reason="a peer is gone")
    run.exit(1711, "7.2", 137, "rank 1 was killed")
    assert read_status(run.folder).starts[-1].reason == "rank 1 was killed"


def test_starts_without_a_launcher_count(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.event(0, "start", from_step=0, lost_steps=0, ranks=1, job=None)
    run.event(5, "end", step=3, exit_code=75, reason="asked to stop")
    run.event(6, "start", from_step=3, lost_steps=0, ranks=1, job=None)
    status = read_status(run.folder)
    assert [start.exit_code for start in status.starts] == [75, None]
    assert status.logs is None
    assert "none: it was not started" in page_of(status)


def test_verify_reads_the_newest_checkpoint(run: FakeRun) -> None:
    checkpoint = run.saved(1500, 60)
    verified = read_status(run.folder, verify=True).checkpoint
    assert verified is not None and (verified.step, verified.verified, verified.damage) == (60, True, None)
    (checkpoint / "cola.json").write_text("[]")
    damaged = read_status(run.folder, verify=True)
    assert damaged.checkpoint is not None and damaged.checkpoint.damage
    assert "damaged" in page_of(damaged)


@pytest.mark.parametrize(("last", "exit_code"), [(1, 1), (2, 1), (3, 0), (4, 0), (9, 0)])
def test_made_progress(run: FakeRun, capsys: pytest.CaptureFixture[str], last: int, exit_code: int) -> None:
    """A third start that never came to training counts as well: two in a row without a checkpoint."""
    run.launch(2000, "7.2")
    run.exit(2003, "7.2", 1, "rank 0 ended with exit code 1")
    assert show(StatusOptions(run=run.folder, made_progress=last)) == exit_code
    assert bool(capsys.readouterr().err) == bool(exit_code)


def test_json_has_everything(run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(StatusOptions(run=run.folder, json=True)) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["checkpoint"]["step"] == 30
    assert facts["starts"][0]["reason"].startswith("rank 1 was killed")


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    status = read_status(run.folder)
    assert (status.step, status.eta_seconds, status.effective_time_ratio) == (0, None, None)
    assert "none yet" in page_of(status)


def test_what_is_no_run_is_told_in_a_line_and_without_torch(tmp_path: Path) -> None:
    for options in ([], ["--made-progress", "3"]):
        command = [sys.executable, "-m", "pretrain.status", str(tmp_path), *options]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert answer.returncode == 2
        assert answer.stderr == f"error: {tmp_path}: holds no config.yaml, so it is no run folder\n"
    with pytest.raises(UserError, match="needs a number of starts"):
        show(StatusOptions(run=tmp_path, made_progress=0))
    loaded = "import sys, pretrain.status, pretrain.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], cwd=ROOT).returncode == 0
