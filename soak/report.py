"""The soak's results: one table for people, one file for programs."""

import statistics
from collections.abc import Iterable, Sequence

from rich.table import Table

from soak.faults import KINDS
from soak.outcomes import Outcome, SoakResult


def by_kind(outcomes: Iterable[Outcome], not_run: Sequence[str] = ()) -> list[dict[str, object]]:
    """A row a kind of fault: how many, how many recovered, steps and (median) seconds lost."""
    groups: dict[str, list[Outcome]] = {name: [] for name in KINDS}
    for outcome in outcomes:
        groups[outcome.fault.name].append(outcome)
    rows: list[dict[str, object]] = []
    for name, group in groups.items():
        seconds = [outcome.seconds_lost for outcome in group if outcome.seconds_lost is not None]
        rows.append(
            {
                "name": name,
                "fault": KINDS[name].title,  # type: ignore[index]
                "count": len(group),
                "recovered": sum(outcome.recovered for outcome in group),
                "steps_lost": sum(outcome.steps_lost for outcome in group),
                "seconds_lost_median": round(statistics.median(seconds), 2) if seconds else None,
                "seconds_lost_most": round(max(seconds), 2) if seconds else None,
                "not_run": "needs root, to mount a small disk" if name in not_run else None,
            }
        )
    return [row for row in rows if row["count"] or row["not_run"]]


def summary(result: SoakResult, planned: int, not_run: Sequence[str]) -> dict[str, object]:
    """The figures of summary.json that come from the faults."""
    return {
        "faults": len(result.outcomes),
        "recovered": result.recovered,
        "restored_by_hand": sum(outcome.fault.name == "corrupt_data" for outcome in result.outcomes),
        "bit_identical": not result.differences,
        "silent_corrupt_loads": result.silent_corrupt_loads,
        "exit_zero_failures": result.exit_zero_failures,
        "starts": result.starts,
        "wall_seconds": round(result.wall_seconds, 1),
        "failures": result.failures(planned),
        "by_fault": by_kind(result.outcomes, not_run),
        "each": [
            {
                "start": outcome.start,
                "name": outcome.fault.name,
                "happened": outcome.happened,
                "exit_code": outcome.exit_code,
                "steps_lost": outcome.steps_lost,
                "seconds_lost": None if outcome.seconds_lost is None else round(outcome.seconds_lost, 2),
                "problems": outcome.problems,
            }
            for outcome in result.outcomes
        ],
    }


def faults_table(content: dict[str, object]) -> Table:
    """The rows of `by_fault` and their sum."""
    rows = content["by_fault"]
    assert isinstance(rows, list), "made by `summary`"
    table = Table(title="A training run under faults", show_footer=True)
    table.add_column("fault", footer="all", no_wrap=True)
    sums = [sum(row[name] for row in rows) for name in ("count", "recovered", "steps_lost")]
    for heading, total in zip(("count", "recovered", "steps lost"), sums, strict=True):
        table.add_column(heading, justify="right", footer=str(total))
    table.add_column("seconds lost (median)", justify="right")
    table.add_column("(most)", justify="right")
    for row in rows:
        if row["not_run"]:
            table.add_row(row["fault"], f"not run: {row['not_run']}", *[""] * 4)
            continue
        columns = ("count", "recovered", "steps_lost", "seconds_lost_median", "seconds_lost_most")
        cells = ["-" if row[name] is None else str(row[name]) for name in columns]
        table.add_row(row["fault"], *cells, style="" if row["recovered"] == row["count"] else "bold red")
    return table
