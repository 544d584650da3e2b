"""The run under faults as its supervisor sees it: started, watched, and checked where it goes on from."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.checkpoints.checkpoint_folder import newest_checkpoint, read_step
from pretrain.config import HISTORY_FILE, RunConfig
from pretrain.run_record.history import Event, read_history
from soak.faults import Fault
from soak.outcomes import Outcome, SoakResult
from soak.run_process import RunProcess, last_step

POLL_SECONDS = 0.01
STUCK_SECONDS = 180.0


class EndedError(Exception):
    """The run ended by itself; the message says how."""


class StuckError(Exception):
    """What had to come did not; the message says what."""


@dataclass(kw_only=True)
class DownState:
    """How things stood when the run went down; kept until a start says from where it goes on."""

    furthest: int
    """Steps done."""
    newest: int
    """Step of the newest checkpoint."""
    expected: int
    """Step of the newest one that is whole."""
    endings: list[Outcome] = field(default_factory=list)
    """What brought it down."""
    damage: Outcome | None = None
    """What was done to the newest checkpoint then."""


class WatchedRun:
    """A run that is started again and again by the same command."""

    def __init__(self, recipe: RunConfig, recipe_file: Path, ranks: int, module: str) -> None:
        self.recipe, self.recipe_file, self.ranks, self.module = recipe, recipe_file, ranks, module
        self.folder = recipe.run_folder
        self.work = recipe_file.parent
        self.result = SoakResult(outcomes=[])
        self.furthest = 0  # steps done, by any start
        self.down: DownState | None = None
        self.process: RunProcess | None = None
        self._open: list[Outcome] = []  # faults that no new step has followed yet
        self._starts_said = 0
        self._history: tuple[int, list[Event]] = (0, [])

    def start(self) -> RunProcess:
        """Start the run, or go on with it."""
        self.result.starts += 1
        logs = self.work / "logs"
        logs.mkdir(exist_ok=True)
        log = logs / f"start_{self.result.starts:03d}.log"
        self.process = RunProcess(self.recipe_file, self.ranks, self.module, log)
        return self.process

    def running(self) -> RunProcess:
        """This start."""
        assert self.process is not None, "started"
        return self.process

    def end(self) -> int:
        """Note how things stand after this start has ended, by itself or else by force; its exit code."""
        process = self.running()
        code = process.exit_code
        if code is None:
            process.end()
            code = 128 + signal.SIGKILL
        if left := process.left_behind():
            self.problem(f"{len(left)} processes did not end with it")
        self.observe()
        self.process = None
        self._starts_said = len(self.events("start"))
        if code == 0 and not self.is_finished():
            self.result.exit_zero_failures += 1
        if self.down is None:
            newest = self.newest_step()
            self.down = DownState(furthest=self.furthest, newest=newest, expected=newest)
        return code

    def problem(self, text: str) -> None:
        """Note what went wrong in this start."""
        self.result.problems.append(f"start {self.result.starts}: {text}")

    def is_finished(self) -> bool:
        """Whether the run has its last checkpoint."""
        return self.newest_step() == self.recipe.training.steps

    def newest_step(self) -> int:
        """Step of the newest complete checkpoint; 0 without any."""
        newest = newest_checkpoint(self.folder)
        return read_step(newest) if newest else 0

    def events(self, name: str) -> list[Event]:
        """Events of one kind in the run's history."""
        path = self.folder / HISTORY_FILE
        size = path.stat().st_size if path.exists() else 0
        if size != self._history[0]:
            self._history = size, read_history(self.folder)
        return [event for event in self._history[1] if event["event"] == name]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Until `condition` holds.

        Raises:
            EndedError: the run ended before.
            StuckError: nothing new happened for too long.
        """
        deadline = time.monotonic() + STUCK_SECONDS
        while not condition():
            furthest = self.furthest
            self.observe()
            if self.furthest > furthest:
                deadline = time.monotonic() + STUCK_SECONDS
            code = self.running().exit_code
            if code is not None and not condition():
                raise EndedError(f"ended with exit code {code} before {what}")
            if time.monotonic() > deadline:
                raise StuckError(f"{what} did not come within {STUCK_SECONDS:g} s")
            time.sleep(POLL_SECONDS)

    def wait_for_end(self) -> None:
        """Until this start has ended. Raises StuckError."""
        self.wait(lambda: self.running().exit_code is not None, "its end")

    def strike(self, fault: Fault, happened: str = "") -> Outcome:
        """Note that a fault strikes now."""
        self.observe()
        outcome = Outcome(fault=fault, start=self.result.starts, struck=time.monotonic(), happened=happened)
        self.result.outcomes.append(outcome)
        if fault.kind.group != "ending":  # else steps that follow before the end do not count
            self.await_new_step(outcome)
        return outcome

    def await_new_step(self, outcome: Outcome) -> None:
        """With the next new step the fault is recovered from."""
        self._open.append(outcome)

    def take_back(self, outcome: Outcome) -> None:
        """It struck nothing."""
        self.result.outcomes.remove(outcome)
        self._open = [other for other in self._open if other is not outcome]

    def observe(self) -> None:
        """See how far the run is; a new step ends the time that faults before it have cost."""
        starts = self.events("start")
        if self.down is not None and len(starts) > self._starts_said:
            self._check_resume(self.down, starts[-1])
            self.down = None
        step = last_step(self.folder)
        if step > self.furthest:
            self.furthest = step
            for outcome in self._open:
                outcome.seconds_lost = time.monotonic() - outcome.struck
            self._open.clear()

    def _check_resume(self, down: DownState, start: Event) -> None:
        """Whether the run goes on from where it has to; what that costs."""
        from_step = int(start["facts"]["from_step"] or 0)
        if down.endings:
            # What was last seen in the metrics may be a step behind what is saved.
            down.endings[-1].steps_lost = max(0, down.furthest - down.newest)
        if down.damage is not None:
            down.damage.steps_lost = down.newest - from_step
            fell_back = [event["facts"]["step"] for event in self.events("fell_back")]
            if from_step >= down.newest:
                down.damage.loaded_silently = True
                down.damage.problems.append("the damaged checkpoint was loaded")
            elif down.newest not in fell_back:
                down.damage.problems.append("history.jsonl does not say that the run fell back")
        if from_step != down.expected:
            struck = [*down.endings, *([down.damage] if down.damage else [])]
            problems = struck[-1].problems if struck else self.result.problems
            problems.append(f"went on from step {from_step}, not from {down.expected}")
