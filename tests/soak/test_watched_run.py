"""From what a run's folder says, the soak tells a recovery from what only looks like one."""

import json
from pathlib import Path

import pytest

from pretrain.config import HISTORY_FILE, METRICS_FILE
from pretrain.run_record.history import History
from soak.faults import Fault, FaultName
from soak.outcomes import SoakResult
from soak.soak_recipe import soak_recipe
from soak.watched_run import DownState, WatchedRun


def fault(name: FaultName) -> Fault:
    return Fault(name=name, after_steps=0, delay_seconds=0.0, rank=0, place=0.0)


@pytest.fixture
def run(tmp_path: Path) -> WatchedRun:
    """A run that went down at step 24; its checkpoints are those of steps 20 and 10."""
    recipe = soak_recipe(tmp_path, "run", "idm", 100)
    recipe.run_folder.mkdir()
    run = WatchedRun(recipe, tmp_path / "run.yaml", 2, "none")
    run.furthest = 24
    outcome = run.strike(fault("kill_rank"))
    run.await_new_step(outcome)
    run.down = DownState(furthest=24, newest=20, expected=20, endings=[outcome])
    return run


def damage_newest(run: WatchedRun) -> None:
    assert run.down is not None
    run.down.damage = run.strike(fault("flip_bit"))
    run.down.expected = 10


def goes_on(run: WatchedRun, from_step: int, new_steps: int = 26) -> SoakResult:
    History(run.folder).record("start", from_step=from_step, lost_steps=0)
    line = {"step": new_steps, "split": "train"}
    (run.folder / METRICS_FILE).write_text(json.dumps(line) + "\n" + '{"step": 27, "spl')
    run.observe()
    return run.result


def test_recovery(run: WatchedRun) -> None:
    result = goes_on(run, 20)
    assert result.failures(1) == [] and result.recovered == 1
    assert result.outcomes[0].steps_lost == 4 and result.outcomes[0].seconds_lost is not None


def test_no_new_step_is_no_recovery(run: WatchedRun) -> None:
    result = goes_on(run, 20, new_steps=24)
    assert result.failures(1) == ["start 0, kill -9 of one rank: no new step followed"]


def test_steps_lost_for_nothing(run: WatchedRun) -> None:
    (line,) = goes_on(run, 10).failures(1)
    assert "went on from step 10, not from 20" in line


def test_fall_back(run: WatchedRun) -> None:
    damage_newest(run)
    History(run.folder).record("fell_back", step=20, reason="bit", to_step=10)
    result = goes_on(run, 10)
    assert result.failures(2) == [] and result.silent_corrupt_loads == 0
    assert [outcome.steps_lost for outcome in result.outcomes] == [4, 10]


def test_silent_load_of_a_damaged_checkpoint(run: WatchedRun) -> None:
    damage_newest(run)
    result = goes_on(run, 20)
    assert result.silent_corrupt_loads == 1 and result.recovered == 1
    assert any("the damaged checkpoint was loaded" in line for line in result.failures(2))


def test_fall_back_that_nobody_is_told_of(run: WatchedRun) -> None:
    damage_newest(run)
    (line,) = goes_on(run, 10).failures(2)
    assert f"{HISTORY_FILE} does not say" in line


def test_wrong_exit_code_and_faults_that_did_not_strike(run: WatchedRun) -> None:
    run.result.outcomes[0].met(0, 137)
    run.result.exit_zero_failures = 1
    assert goes_on(run, 20).failures(3) == [
        "start 0, kill -9 of one rank: exit code 0 instead of 137",
        "2 of 3 faults did not strike",
        "1 starts ended with exit code 0 and the run unfinished",
    ]
