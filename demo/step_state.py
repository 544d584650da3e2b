"""What is known about a list of steps: which are finished, which can go on, which must be run anew.

Kept in `steps.json` in the working folder, rewritten whenever a step starts or ends (by rename, so that it is
never half-written). A step counts as finished only if it ended well, from the same command and recipes, after
the same steps, and its outputs are still the files that it left.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from data_prep.errors import UserError
from data_prep.output_files import write_json_whole

STATE_FILE = "steps.json"
STATE_FORMAT = 1

Status = Literal["running", "failed", "interrupted", "finished"]
Action = Literal["skip", "resume", "run", "run anew"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command, and how to tell that its result is there."""

    name: str
    """Shown to the user; also the name of the log file."""
    command: tuple[str, ...]
    """Arguments of the Python interpreter, without --resume and --overwrite."""
    target: Path
    """File or folder the command creates; where it exists, the command gets --resume or --overwrite."""
    outputs: tuple[str, ...]
    """Glob patterns below the working folder, each met by a complete result; what they match is hashed."""
    recipes: tuple[Path, ...] = ()
    """Files besides the command line that decide the result."""
    resumable: bool = False
    """Whether the command knows --resume; others start anew with --overwrite."""
    threads: int = 1
    """Threads a process of the command may use (OMP_NUM_THREADS); the result must not depend on it."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What `steps.json` says about one step."""

    name: str
    """Name of the step."""
    status: Status
    """How far it came; "running" is what a killed run leaves behind."""
    fingerprint: str
    """Hash of the command, its recipes and the fingerprint of the step before."""
    seconds: float = 0.0
    """Time spent, over all attempts that worked on this result."""
    command: str = ""
    """The command as last run, for the reader."""
    outputs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file that the outputs of a finished step matched."""


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step with its state: what running it would do."""

    step: Step
    """The step."""
    fingerprint: str
    """As in `StepRecord`, from the command and recipes as they are now."""
    action: Action
    """What to do."""
    seconds: float
    """Time already spent on this result."""


class StepState:
    """The records of a list of steps, on disk and in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / STATE_FILE
        self._records = {record.name: record for record in read_records(self._path)}

    @property
    def total_seconds(self) -> float:
        """Time spent on all results that are there."""
        return sum(record.seconds for record in self._records.values())

    def plan(self, steps: Sequence[Step]) -> list[PlannedStep]:
        """What is to be done with each of `steps`, in order."""
        planned: list[PlannedStep] = []
        fingerprint = ""
        for step in steps:
            fingerprint = _fingerprint(step, fingerprint)
            # A step that is done again makes every later result stale, even where fingerprints agree.
            stale = any(p.action != "skip" for p in planned)
            action = self._action(step, fingerprint, stale)
            seconds = self._records[step.name].seconds if action in ("skip", "resume") else 0.0
            planned.append(PlannedStep(step=step, fingerprint=fingerprint, action=action, seconds=seconds))
        return planned

    def _action(self, step: Step, fingerprint: str, stale: bool) -> Action:
        anew: Action = "run anew" if step.target.exists() else "run"
        record = self._records.get(step.name)
        if record is None or record.fingerprint != fingerprint or stale:
            return anew
        if record.status == "finished":
            return "skip" if hash_outputs(self._folder, step) == record.outputs else anew
        return "resume" if step.resumable and step.target.exists() else anew

    def forget_from(self, index: int, steps: Sequence[Step]) -> None:
        """Drop what is known of `steps[index]`, of all after it, and of steps that left the list."""
        kept = [step.name for step in steps[:index]]
        self._records = {name: self._records[name] for name in kept}

    def save(self, record: StepRecord) -> None:
        """Add or replace a record and write all of them."""
        self._records[record.name] = record
        state = {"format": STATE_FORMAT, "steps": [asdict(r) for r in self._records.values()]}
        write_json_whole(self._path, state)


def read_records(state_path: Path) -> list[StepRecord]:
    """The records in a `steps.json`; none if there is no such file.

    Raises:
        UserError: if the file is not one that this module wrote.
    """
    if not state_path.exists():
        return []
    try:
        state = json.loads(state_path.read_text())
        if state["format"] != STATE_FORMAT:
            raise ValueError(f"format {state['format']}")
        return [StepRecord(**record) for record in state["steps"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state_path}: not readable ({error}); delete it to run every step anew") from None


def missing_outputs(folder: Path, step: Step) -> list[str]:
    """Output patterns of `step` that match no file in `folder`."""
    return [pattern for pattern in step.outputs if not any(path.is_file() for path in folder.glob(pattern))]


def hash_outputs(folder: Path, step: Step) -> dict[str, str]:
    """SHA-256 of each file that the outputs of `step` match in `folder`, by its path there."""
    matched = {path for pattern in step.outputs for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): _sha256(path) for path in sorted(matched)}


def _fingerprint(step: Step, fingerprint_before: str) -> str:
    recipes = {str(path): _sha256(path) for path in step.recipes}
    identity = [fingerprint_before, step.command, recipes]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
