"""One way to fail for every command of the project: one line on stderr, and an exit code that says what kind.

    2  a setting, file or folder that the user gave cannot be used (UserError)
    3  an input file or row is damaged or not in its format (InputDataError)
    4  the file system took no more: a full disk, a quota, read-only, failing
    5  two things that must agree do not: a checksum, or two tokenizers on one text (IntegrityError)
    6  training went wrong: too many steps in a row with a non-finite or spiking loss (TrainingError)
    7  training stood still, and ended itself after writing the stacks of its threads
    75 training was asked to stop: it saved and goes on when it is started again

Any other exception keeps its traceback, since it is a mistake of ours, and ends with 1. A process killed by signal N
ends with 128 + N.
"""

import errno
import sys
from collections.abc import Callable

USER_ERROR_EXIT_CODE = 2
STORAGE_EXIT_CODE = 4
HANG_EXIT_CODE = 7
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


class UserError(ValueError):
    """Bad input: the message is one clear line naming the file, field or flag, and what to do about it."""

    exit_code = USER_ERROR_EXIT_CODE


class InputDataError(UserError):
    """A file or row of a corpus that cannot be read; `--on-error skip` counts these instead of stopping."""

    exit_code = 3


class IntegrityError(UserError):
    """Something is not what its checksum or its reference says."""

    exit_code = 5


class StorageError(UserError):
    """The file system took no more, and what had to be written is not."""

    exit_code = STORAGE_EXIT_CODE


class TrainingError(UserError):
    """Steps went wrong more often than the recipe allows."""

    exit_code = 6


class StoppedError(UserError):
    """A run was asked to stop, and has saved: no mistake, but not its end either."""

    exit_code = STOPPED_EXIT_CODE


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry point; turn a `UserError`, or a full disk, into one line on stderr and its exit code."""
    try:
        main()
    except UserError as error:
        is_error = error.exit_code != STOPPED_EXIT_CODE
        print(f"error: {error}" if is_error else error, file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        where = error.filename or "the output folder"
        print(
            f"error: {where}: {error.strerror}; make room, then run the same command again "
            "(with --resume where it has one)",
            file=sys.stderr,
        )
        sys.exit(STORAGE_EXIT_CODE)
