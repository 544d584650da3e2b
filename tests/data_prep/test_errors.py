"""Every kind of failure ends in one line and its own exit code; a mistake of ours keeps its traceback."""

import errno

import pytest

from data_prep.errors import InputDataError, IntegrityError, UserError, run_cli


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("--flag is wrong; mend it"), 2, "error: --flag is wrong; mend it\n"),
        (InputDataError("a: row 3"), 3, "error: a: row 3\n"),
        (IntegrityError("b"), 5, "error: b\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            4,
            "error: /x/y: No space left on device; ",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "error: the output folder: No space left"),
    ],
)
def test_exit_codes(error: Exception, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    assert stop.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("ours"), FileNotFoundError(errno.ENOENT, "no file")])
def test_mistakes_of_ours_are_raised(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        run_cli(main)
