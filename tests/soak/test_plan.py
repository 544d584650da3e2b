"""The plan of a soak is a pure function of its arguments, and can be carried out."""

import pytest

from soak.faults import KINDS
from soak.plan import TURN, make_plan


def test_plan_is_decided_by_the_seed() -> None:
    assert make_plan(40, 7, 2) == make_plan(40, 7, 2)
    assert make_plan(40, 7, 2) != make_plan(40, 8, 2)


def test_one_turn_has_every_kind() -> None:
    assert len(TURN) == 25
    assert {fault.name for fault in make_plan(25, 0, 2).faults} == set(KINDS)


def test_every_variant_has_its_turn_in_a_long_soak() -> None:
    planned = {(fault.name, fault.variant) for fault in make_plan(200, 0, 2).faults}
    assert planned == {(name, variant) for name, kind in KINDS.items() for variant in kind.variants}


@pytest.mark.parametrize("faults", [1, 2, 8, 25, 26, 137, 200])
@pytest.mark.parametrize("seed", range(5))
def test_plan_can_be_carried_out(faults: int, seed: int) -> None:
    plan = make_plan(faults, seed, 2)
    assert faults <= len(plan.faults) <= faults + 1
    for start in plan.starts:
        assert start.ending.kind.group == "ending"
        assert start.passing is None or start.passing.kind.group == "passing"
        assert start.down is None or start.down.kind.group == "down"
        assert start.ending.name != "kill_while_starting" or start.passing is start.down is None
    assert all(after - before > 1 for before, after in zip(plan.nan_steps, plan.nan_steps[1:], strict=False))
    assert all(0 < step < plan.steps for step in plan.nan_steps)


def test_a_kind_can_be_left_out() -> None:
    plan = make_plan(25, 0, 2, left_out=("fill_disk",))
    assert len(plan.faults) >= 25
    assert "fill_disk" not in {fault.name for fault in plan.faults}
