"""The shares of a job array: everything, nothing twice, and a clear no to what cannot be shared out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.work_slice import work_slice


def array(task: int, first: int, last: int, step: int = 1, count: int | None = None) -> dict[str, str]:
    tasks = (last - first) // step + 1 if count is None else count
    values = {"ID": task, "MIN": first, "MAX": last, "STEP": step, "COUNT": tasks}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@given(count=st.integers(0, 300), first=st.integers(0, 50), tasks=st.integers(1, 40), step=st.integers(1, 5))
def test_every_item_belongs_to_exactly_one_task(count: int, first: int, tasks: int, step: int) -> None:
    last = first + (tasks - 1) * step
    shares = [
        work_slice(count, None, array(task, first, last, step)) for task in range(first, last + 1, step)
    ]
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2:5", range(2, 5)), (":3", range(3)), ("7:", range(7, 10)), (":", range(10)), ("8:99", range(8, 10))],
)
def test_a_slice_is_read_as_python_does(text: str, expected: range) -> None:
    assert work_slice(10, text, {}) == expected
    assert work_slice(10, text, array(1, 0, 3)) == expected  # what is said goes before what Slurm says


def test_without_slice_and_array_everything() -> None:
    assert work_slice(10, None, {}) == range(10)


@pytest.mark.parametrize("text", ["", "3", "a:b", "-2:", "1:2:3", "1.0:2", " 1:2"])
def test_a_malformed_slice_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not of the form a:b"):
        work_slice(10, text, {})


@pytest.mark.parametrize("text", ["10:", "5:5", "6:2", "12:20", ":0"])
def test_an_empty_slice_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="holds nothing of the 10 there are"):
        work_slice(10, text, {})


@pytest.mark.parametrize(
    "environment",
    [array(5, 0, 9, count=4), array(5, 0, 9, step=2), array(12, 0, 9), array(0, 0, 9, step=1, count=3)],
)
def test_indices_that_are_not_evenly_spaced_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="not evenly spaced"):
        work_slice(10, None, environment)


def test_half_an_array_environment_is_refused() -> None:
    with pytest.raises(UserError, match="sbatch --array"):
        work_slice(10, None, {"SLURM_ARRAY_TASK_ID": "3"})
