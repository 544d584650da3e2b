"""Read a training run's `metrics.jsonl`: typed lines, the series in them, the median throughput."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
from pydantic import BaseModel, ValidationError

from data_prep.errors import UserError

WARM_UP_SHARE = 0.1  # the first train lines hold start-up costs and say little about throughput

Split = Literal["train", "validation"]


class MetricLine(BaseModel):
    """One line of `metrics.jsonl`; a figure that does not apply to the stage is absent (None)."""

    step: int
    stage: str
    split: Split
    consumed_tokens: int | None = None
    elapsed_seconds: float | None = None
    loss: float | None = None
    prediction_loss: float | None = None
    base_loss: float | None = None
    tokens_per_second: float | None = None
    alive_actions: float | None = None
    action_perplexity: float | None = None
    action_accuracy: float | None = None
    action_fractions: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """One figure over the steps of a run; steps and values have the same length."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """All lines of one run, in the order of steps."""

    path: Path
    train: list[MetricLine]
    validation: list[MetricLine]

    def series(self, name: str, split: Split = "train") -> Series:
        """The lines of `split` that have the figure `name`."""
        lines = self.train if split == "train" else self.validation
        found = [(line.step, getattr(line, name)) for line in lines if getattr(line, name) is not None]
        return Series(steps=[step for step, _ in found], values=[float(value) for _, value in found])

    def objective(self, split: Split = "train") -> Series:
        """What the stage learns: next-token loss without regulariser (base, idm), action loss (policy)."""
        if self.train[0].stage == "policy":
            return self.series("loss", split)  # there, prediction_loss is that of the greedy action
        prediction = self.series("prediction_loss", split)
        return prediction if prediction.steps else self.series("loss", split)

    def action_fractions(self) -> tuple[list[int], np.ndarray]:
        """Steps and the share of each action, [time, actions], from the train lines that have it."""
        found = [
            (line.step, line.action_fractions) for line in self.train if line.action_fractions is not None
        ]
        return [step for step, _ in found], np.array([fractions for _, fractions in found])

    def median_tokens_per_second(self) -> float | None:
        """Median over the train lines after the first tenth of them; None where nothing was measured."""
        values = [line.tokens_per_second for line in self.train[int(len(self.train) * WARM_UP_SHARE) :]]
        measured = [value for value in values if value is not None]
        return median(measured) if measured else None

    def seconds(self) -> float | None:
        """Time the run took by its last line, None where it was not logged."""
        elapsed = [
            line.elapsed_seconds for line in self.train + self.validation if line.elapsed_seconds is not None
        ]
        return max(elapsed) if elapsed else None


def read_metrics(path: Path) -> RunMetrics:
    """Read a `metrics.jsonl`; of lines that say the same step twice (after a resume) the later counts.

    `UserError` where the file is missing, has a line that is not a metric line, or has no train line.
    """
    if not path.is_file():
        raise UserError(f"{path}: not there; train the run first")
    lines: dict[tuple[str, int], MetricLine] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = MetricLine.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            raise UserError(
                f"{path}:{number}: {where}: {first['msg']}; delete the line or train the run anew"
            ) from None
        lines[line.split, line.step] = line
    ordered = sorted(lines.values(), key=lambda line: line.step)
    train = [line for line in ordered if line.split == "train"]
    if not train:
        raise UserError(f"{path}: has no train line; train the run first")
    return RunMetrics(
        path=path, train=train, validation=[line for line in ordered if line.split == "validation"]
    )
