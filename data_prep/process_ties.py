"""Child processes that do not outlive their parent."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux' prctl


def die_with_parent(parent: int) -> None:
    """Let Linux kill this process when its parent dies, so that none goes on writing beside a resumed run.

    Args:
        parent: its process number, asked for before this process was started.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        os._exit(1)
