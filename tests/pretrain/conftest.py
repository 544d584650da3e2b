"""What the tests of pretrain/ share: Megatron on one process, in a form that no test leaves behind."""

# ruff: noqa: E402  Megatron is imported after the redirects
import os
from collections.abc import Iterator

import pytest

# Before torch is imported: tests/conftest.py comes too late when pytest is given this folder.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pretrain import cpu_redirects

cpu_redirects.apply()

from pretrain.parallel import ParallelContext, parallel_context


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    """One rank's process groups, closed after each file so that tests which open their own find none open."""
    with parallel_context(tensor_parallel_size=1, seed=0) as opened:
        yield opened
