"""Starts the ranks of one node through torch's elastic launcher, what `torchrun` is made of, and waits for their end.

Loads torch; `pretrain.launch` comes here only when there is something to start.
"""

import logging
import os
import sys
from collections.abc import Callable

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pretrain.launching.launch_options import NodeLayout
from pretrain.run_record.run_logs import JOB_VARIABLE

MEETING_SECONDS = 900  # that nodes wait for each other: a job's nodes may take minutes to load the same files


class _LogsOfRanks(LogsSpecs):
    """Leaves output to the ranks, which open their own logs, and tells when they are about to start."""

    def __init__(self, job: str, before_start: Callable[[], None]) -> None:
        super().__init__()
        self._job, self._before_start = job, before_start

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Called once, with the environments of the ranks to come."""
        self._before_start()
        for env in envs.values():
            env[JOB_VARIABLE] = self._job
        nowhere_else = dict.fromkeys(envs, "")
        return LogsDest(stdouts=nowhere_else, stderrs=nowhere_else, error_files=nowhere_else)

    @property
    def root_log_dir(self) -> str:
        """Nothing is written by torch."""
        return ""


def run_ranks(
    layout: NodeLayout, job: str, python_arguments: list[str], before_start: Callable[[], None]
) -> dict[int, int]:
    """Run this node's ranks to the end of all; when one fails, the others have 30 seconds to end.

    Args:
        layout: how many, and where.
        job: the name of this start.
        python_arguments: what each rank is, for the interpreter.
        before_start: called when the nodes have met, just before the first process starts.

    Returns:
        Return codes of the ranks of this node that did not end well, by rank; -N for a rank killed by signal N.

    Raises:
        ConnectionError: if the nodes do not meet.
    """
    one_node = layout.nodes == 1
    config = LaunchConfig(
        min_nodes=layout.nodes,
        max_nodes=layout.nodes,
        nproc_per_node=layout.ranks_per_node,
        run_id="nodes",  # the same on all of them
        rdzv_backend="c10d" if one_node else "static",
        rdzv_endpoint="localhost:0" if one_node else layout.master,
        rdzv_configs={"rank": layout.node_rank, "timeout": MEETING_SECONDS},
        local_addr="127.0.0.1" if one_node else None,
        max_restarts=0,
        logs_specs=_LogsOfRanks(job, before_start),
        signals_to_handle="",  # the launcher has its own way
    )
    if layout.ranks_per_node > 1:  # as torchrun does: ranks share the cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.disable()  # torch's account of itself; what the ranks say is in their logs
    try:
        elastic_launch(config, sys.executable)(*python_arguments)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except DistError as error:
        raise ConnectionError(str(error).splitlines()[0]) from error
    finally:
        logging.disable(logging.NOTSET)
    return {}
