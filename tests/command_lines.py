"""Commands of ours run in the tests' own process, for which Python need not start and import torch anew."""

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable

import pytest

from data_prep.errors import run_cli
from tests.repository_rules import ROOT


def run_here(main: Callable[[], None], *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `main` with `arguments`, called as its module calls it, prints and ends with, at the project's root."""
    printed, said = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(said),
    ):
        patch.setattr(sys, "argv", ["", *arguments])
        patch.chdir(ROOT)
        try:
            run_cli(main)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(arguments, code, printed.getvalue(), said.getvalue())
