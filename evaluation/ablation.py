"""Read the runs of an ablation for the report: `ablation.json`, {"runs": [{"name", "metrics", "figures"}]}.

"metrics" is the path of a run's metrics.jsonl, from the folder of the list; "figures" its final figures
by name.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from data_prep.errors import UserError
from evaluation.run_metrics import RunMetrics, read_metrics

ABLATION_FILE = "ablation.json"


class _Run(BaseModel):
    name: str
    metrics: Path
    figures: dict[str, float]


class _Ablation(BaseModel):
    runs: list[_Run]


@dataclass(frozen=True, kw_only=True)
class AblationRun:
    """One compared run."""

    name: str
    """What was changed."""
    metrics: RunMetrics
    """Its curves."""
    figures: dict[str, float]
    """Its final figures by name, as the table shows them."""


def read_ablation(path: Path) -> list[AblationRun]:
    """Read the list and every run's metrics; `UserError` where a file is missing or malformed."""
    try:
        runs = _Ablation.model_validate_json(path.read_bytes()).runs
    except FileNotFoundError:
        raise UserError(f"{path}: not there; run the ablation first or leave out --ablation") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; run the ablation anew"
        ) from None
    if not runs:
        raise UserError(f"{path}: lists no runs; run the ablation anew")
    return [
        AblationRun(name=run.name, metrics=read_metrics(path.parent / run.metrics), figures=run.figures)
        for run in runs
    ]
