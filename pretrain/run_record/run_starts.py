"""The starts of a run and how each ended: from the run's history, and from what its launchers saw."""

from dataclasses import dataclass
from pathlib import Path

from pretrain.config import LOGS_FOLDER
from pretrain.run_record.history import Event, read_events, read_history
from pretrain.run_record.run_logs import LAUNCHES_FILE


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run."""

    time: float
    """When, in seconds since 1970."""
    job: str
    """Its name; empty where none was given."""
    from_step: int | None
    """Where it went on; None: it never came to training."""
    lost_steps: int
    """Steps done before that it had to do again."""
    saved: int
    """Checkpoints it completed."""
    exit_code: int | None
    """None: it has not ended, or nobody was left to note it."""
    reason: str
    """How it ended, in words; empty where `exit_code` is None."""
    host: str
    """Of its launcher; empty without one."""
    pid: int | None
    """Of its launcher."""


def read_starts(run_folder: Path) -> list[Start]:
    """All starts, oldest first: of launchers, whether they came to training or not, and of runs without a launcher."""
    groups: list[list[Event]] = []
    for event in sorted(
        read_history(run_folder) + _read_launches(run_folder), key=lambda event: event["time"]
    ):
        seen = {before["event"] for before in groups[-1]} if groups else set()
        begins = event["event"] == "launch" or (
            event["event"] in ("start", "end")
            and (not groups or bool(seen & {event["event"], "end", "exit"}))
        )
        if begins:
            groups.append([])
        if groups:
            groups[-1].append(event)
    return [_describe_start(group) for group in groups]


def made_progress(starts: list[Start], last: int) -> bool:
    """False if each of the `last` newest starts completed no checkpoint; True where there are not so many."""
    return len(starts) < last or any(start.saved for start in starts[-last:])


def _describe_start(events: list[Event]) -> Start:
    begin = events[0]
    trained = next((event["facts"] for event in events if event["event"] == "start"), None)
    # The launcher's account comes last and has the code that the job sees; the history's has the better words.
    ends = {event["event"]: event["facts"] for event in events if event["event"] in ("end", "exit")}
    end = ends.get("exit") or ends.get("end") or {}
    words = ends.get("end", end) if ends.get("end", {}).get("exit_code") == end.get("exit_code") else end
    code, pid = end.get("exit_code"), begin["facts"].get("pid")
    return Start(
        time=begin["time"],
        job=str(begin["facts"].get("job") or ""),
        from_step=None if trained is None else int(trained.get("from_step") or 0),
        lost_steps=0 if trained is None else int(trained.get("lost_steps") or 0),
        saved=sum(event["event"] == "saved" for event in events),
        exit_code=None if code is None else int(code),
        reason=str(words.get("reason", "")),
        host=str(begin["facts"].get("host", "")),
        pid=None if pid is None else int(pid),
    )


def _read_launches(run_folder: Path) -> list[Event]:
    files = (run_folder / LOGS_FOLDER).glob(f"*/{LAUNCHES_FILE}")
    return [event for path in files for event in read_events(path)]
