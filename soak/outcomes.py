"""What became of each fault, and of the soak as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from soak.faults import Fault


@dataclass(kw_only=True)
class Outcome:
    """What became of one fault."""

    fault: Fault
    start: int
    """In which start of the run it struck; the first is 1."""
    struck: float
    """When (time.monotonic)."""
    happened: str = ""
    """What was done in particular."""
    exit_code: int | None = None
    """How the start ended that met it; None: it went on."""
    steps_lost: int = 0
    """Steps that were done and had to be done again."""
    seconds_lost: float | None = None
    """From the fault to the first new step; None: there was none."""
    loaded_silently: bool = False
    """The damaged checkpoint was loaded."""
    problems: list[str] = field(default_factory=list)
    """Whatever was not as it has to be."""

    @property
    def recovered(self) -> bool:
        """The run went on, and as it has to."""
        return self.seconds_lost is not None and not self.problems

    def met(self, exit_code: int, expected: int) -> None:
        """Note how the start ended that met the fault."""
        self.exit_code = exit_code
        if exit_code != expected:
            self.problems.append(f"exit code {exit_code} instead of {expected}")


@dataclass(kw_only=True)
class SoakResult:
    """What became of all faults."""

    outcomes: list[Outcome]
    """One for each fault that struck."""
    starts: int = 0
    """Starts of the run under faults, the first included."""
    exit_zero_failures: int = 0
    """Starts that ended with exit code 0 and the run unfinished."""
    wall_seconds: float = 0.0
    """Of the run under faults, from its first start to its end."""
    problems: list[str] = field(default_factory=list)
    """What went wrong beside the faults."""
    differences: Sequence[str] = ()
    """What is not bit-identical to the uninterrupted run."""

    @property
    def recovered(self) -> int:
        """Faults that were recovered from."""
        return sum(outcome.recovered for outcome in self.outcomes)

    @property
    def silent_corrupt_loads(self) -> int:
        """Damaged checkpoints that were loaded."""
        return sum(outcome.loaded_silently for outcome in self.outcomes)

    def failures(self, planned: int) -> list[str]:
        """Everything that keeps the soak of `planned` faults from having passed, a line each."""
        lines = list(self.problems)
        for outcome in self.outcomes:
            problems = outcome.problems or ([] if outcome.recovered else ["no new step followed"])
            lines += [f"start {outcome.start}, {outcome.fault.kind.title}: {text}" for text in problems]
        if len(self.outcomes) < planned:
            lines.append(f"{planned - len(self.outcomes)} of {planned} faults did not strike")
        if self.exit_zero_failures:
            lines.append(f"{self.exit_zero_failures} starts ended with exit code 0 and the run unfinished")
        return lines + [f"not bit-identical to the uninterrupted run: {line}" for line in self.differences]
