"""One way to fail for every command of the project.

A mistake of the user's ends in one line on stderr that names the thing and the remedy, and exit code 2; any
other exception keeps its traceback, since it is a mistake of ours.
"""

import sys
from collections.abc import Callable

USER_ERROR_EXIT_CODE = 2


class UserError(ValueError):
    """Bad input: the message is one clear line naming the file, field or flag, and what to do about it."""


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry point; turn a `UserError` into one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
