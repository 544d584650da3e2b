"""Which part of a list of work is this process's: a slice it was given, or its share of a Slurm job array.

work_slice(200, "50:100", os.environ)   numbers 50 to 99
work_slice(200, None, os.environ)       all 200; in `sbatch --array=0-9`, the 20 of this task
"""

import re
from collections.abc import Mapping

from data_prep.errors import UserError

SLICE = re.compile(r"(\d*):(\d*)")


def work_slice(count: int, text: str | None, environment: Mapping[str, str]) -> range:
    """Return the numbers of 0 to `count` - 1 that are this process's.

    The tasks of a job array get neighbouring parts of equal size, up to one, and together everything; where
    there are more tasks than work, some get none.

    Args:
        count: pieces of work in all.
        text: "a:b" as in Python: from a (default 0) up to but not including b (default `count`); None: by the
            variables that Slurm sets for a job array, or everything where there are none.
        environment: the process's environment.

    Raises:
        UserError: `text` is no slice or holds nothing, or the array's indices are not evenly spaced.
    """
    if text is not None:
        return _parse_slice(count, text)
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return range(count)
    task, tasks = _array_place(environment)
    return range(count * task // tasks, count * (task + 1) // tasks)


def _parse_slice(count: int, text: str) -> range:
    match = SLICE.fullmatch(text)
    if match is None:
        raise UserError(f"slice {text!r} is not of the form a:b with whole numbers, such as 0:10, 10: or :10")
    chosen = range(count)[int(match[1] or 0) : int(match[2] or count)]
    if not chosen:
        raise UserError(f"slice {text!r} holds nothing of the {count:,} there are; they are counted from 0")
    return chosen


def _array_place(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return (place of this task in the job array, number of its tasks)."""
    try:
        task, first, last, count, step = (
            int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", ""), ("MIN", ""), ("MAX", ""), ("COUNT", "0"), ("STEP", "1"))
        )
    except ValueError as error:
        raise UserError(
            "SLURM_ARRAY_TASK_ID is set but SLURM_ARRAY_TASK_MIN and _MAX are not whole numbers; "
            "start the command from sbatch --array, or give a slice a:b"
        ) from error
    tasks = (last - first) // max(step, 1) + 1
    if step < 1 or not first <= task <= last or (task - first) % step or count not in (0, tasks):
        raise UserError(
            f"job array of {count} tasks from {first} to {last}, step {step}: its indices are not evenly "
            "spaced, so the work cannot be shared out; use --array=0-N, or give a slice a:b"
        )
    return (task - first) // step, tasks
