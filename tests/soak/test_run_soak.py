"""A soak of a trainer that is broken on purpose fails, and says why."""

from pathlib import Path

import pytest

from soak.faults import Fault
from soak.plan import SoakPlan, StartPlan
from soak.run_soak import carry_out


@pytest.mark.distributed
def test_broken_trainer_is_found_out(tmp_path: Path) -> None:
    """It loads what is damaged, and forgets the optimizer's state: both show, though the run seems to recover."""
    kill = Fault(name="kill_rank", after_steps=12, delay_seconds=0.0, rank=1, place=0.0)
    delete = Fault(
        name="delete_file", variant="XXH128SUMS", after_steps=0, delay_seconds=0.0, rank=0, place=0.0
    )
    plan = SoakPlan(steps=45, starts=(StartPlan(passing=None, ending=kill, down=delete),), nan_gradients=())
    result = carry_out(plan, tmp_path, ranks=2, module="tests.soak.broken_worker")
    failures = result.failures(2)
    assert result.problems == [] and result.outcomes[0].recovered
    assert result.silent_corrupt_loads == 1
    assert any("bit-identical" in line and "optimizer" in line for line in failures), failures
    assert any("bit-identical" in line and "metrics" in line for line in failures), failures
