"""history.jsonl of a run folder: what happened to the run, one line an event, over all its starts.

    start        a start: from_step, lost_steps (done before, to be done again), ranks, job, revision
    training     its first step is done: import_seconds, groups_seconds, load_seconds, first_step_seconds
    saved        a checkpoint: step, blocked_seconds (training waited), seconds (until complete), bytes
    save_failed  step, reason
    fell_back    a checkpoint that was damaged: step, reason, to_step (None: none is left)
    bad_step     step, reason, action (skipped, rolled_back, stopped)
    rolled_back  step, to_step
    end          step, exit_code, reason; missing where a start was killed

Every line has `event` and `time` (seconds since 1970). Metrics, without what was lost or rolled back, are in
metrics.jsonl.
"""

import json
import time
from pathlib import Path
from typing import TypedDict

from data_prep.output_files import append_line
from pretrain.config import HISTORY_FILE

Fact = str | int | float | None


class Event(TypedDict):
    """One line."""

    event: str
    time: float
    facts: dict[str, Fact]


class History:
    """Appends to a run's history; a silent one (`active` false), on all ranks but the first, does nothing."""

    def __init__(self, run_folder: Path, active: bool = True) -> None:
        self.path = run_folder / HISTORY_FILE
        self.active = active

    def record(self, event: str, **facts: Fact) -> None:
        """Append a line. A disk that is full does not end the run: the line is lost."""
        if not self.active:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **facts})
        try:
            append_line(self.path, line)
        except OSError as error:
            print(f"warning: {self.path}: {error.strerror}; not written: {line}", flush=True)


def read_history(run_folder: Path) -> list[Event]:
    """All events of a run, oldest first."""
    return read_events(run_folder / HISTORY_FILE)


def read_events(path: Path) -> list[Event]:
    """The events in a file of such lines; those that a crash cut short are left out."""
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            fields = json.loads(line)
            events.append(Event(event=fields.pop("event"), time=fields.pop("time"), facts=fields))
        except (ValueError, KeyError, AttributeError):
            continue
    return events
