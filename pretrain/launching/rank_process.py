"""What the launcher starts for each rank: a process tied to the launcher, with a log of its own, that runs a module.

    python -m pretrain.launching.rank_process LAUNCHER_PID LOG_FOLDER MODULE [ARGUMENT ...]

Not for the command line: `python -m pretrain.launch` starts it.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from data_prep.process_ties import die_with_parent
from pretrain.faults.stop_request import STOP_SIGNALS
from pretrain.run_record.run_logs import rank_log


def main() -> None:
    """Tie, redirect, run."""
    launcher, folder, module, *arguments = sys.argv[1:]
    die_with_parent(int(launcher))
    log = os.open(
        rank_log(Path(folder), int(os.environ["RANK"])), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    # The launcher holds its signals back and passes them on. One that comes before the run can save ends this process.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to answer
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
