"""One rank's share of a checkpoint, written in a process of its own while training goes on.

Megatron plans which rank writes what and copies the tensors; writing them is ours, since Megatron waits for ever for a
writer that was killed. The process is forked, holds nothing but tensors in host memory, computes the checksum of each
file it has written, and dies with its rank.
"""

import multiprocessing
import os
import queue
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.serialization import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from data_prep.output_files import file_checksum
from data_prep.process_ties import die_with_parent
from pretrain.faults.stop_request import leave_signals_to_the_rank

BACKEND, BACKEND_VERSION = "torch_dist", 1


@dataclass(frozen=True, kw_only=True)
class FolderPlan:
    """What a rank has to write of one Megatron distributed checkpoint, its tensors copied to host memory."""

    name: str
    """Of the folder, under the checkpoint's."""
    writer: FileSystemWriterAsync
    """Writes the index at the end."""
    buckets: list[WriteBucket]
    """A file each."""
    metadata: Metadata | None
    """The index without the places in the files; on the first rank only."""
    common: dict[str, Any] | None
    """What is not sharded; on the first rank only."""


class Written(NamedTuple):
    """What a writer process has done."""

    results: list[list[WriteResult]]
    """Places of the tensors in the files, by folder."""
    checksums: dict[str, str]
    """By path under the checkpoint."""


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's way of saving, up to the point where something is written."""

    writer: FileSystemWriterAsync
    metadata: Metadata | None

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, planned: tuple[object, Metadata | None, object]
    ) -> AsyncRequest:
        self.writer, self.metadata = writer, planned[1]
        return AsyncRequest(None, (), [])


def plan_folder(state: dict[str, Any], checkpoint: Path, name: str, first_rank: bool) -> FolderPlan:
    """Decide which rank writes what of a sharded `state`, and copy this rank's share. Collective.

    Args:
        state: Megatron sharded state.
        checkpoint: the checkpoint's (partial) folder.
        name: the folder in it.
        first_rank: whether this rank also writes what is not sharded.
    """
    # The results come back through a pipe of ours; Megatron's queue is a process more that can die.
    filesystem_async._results_queue = filesystem_async._results_queue or queue.SimpleQueue()
    sharded, common = save_preprocess(state)
    strategy = _PlanOnly(BACKEND, BACKEND_VERSION, thread_count=1)
    strategy.async_save(sharded, checkpoint / name)
    return FolderPlan(
        name=name,
        writer=strategy.writer,
        buckets=FileSystemWriterAsync.preload_tensors(strategy.writer.write_buckets or []),
        metadata=strategy.metadata,
        common=common if first_rank else None,
    )


class WriterProcess:
    """Writes `plans` under `checkpoint`; `poll` says how far it is."""

    def __init__(self, plans: list[FolderPlan], checkpoint: Path, timeout_seconds: float) -> None:
        self.written: Written | None = None
        self.failure = ""
        self._deadline = time.monotonic() + timeout_seconds
        self._timeout_seconds = timeout_seconds
        fork = multiprocessing.get_context("fork")
        self._results, results = fork.Pipe(duplex=False)
        self._process = fork.Process(
            target=_write, args=(plans, checkpoint, results, os.getpid()), daemon=True
        )
        self._process.start()
        results.close()  # so that the end of the process is the end of the pipe
        for plan in plans:  # the process has its own
            plan.buckets.clear()
            plan.writer.write_buckets = None

    def poll(self) -> bool:
        """True while it writes; then `written` is set, or `failure` says why it is not."""
        if self.written is not None or self.failure:
            return False
        if self._results.poll():
            self._receive()
        elif time.monotonic() > self._deadline:
            self.kill()
            self.failure = f"writing took more than {self._timeout_seconds:g} s"
        else:
            return True
        return False

    def kill(self) -> None:
        """End it; does nothing where it has ended."""
        self._process.kill()

    def _receive(self) -> None:
        try:
            answer = self._results.recv()
        except (EOFError, OSError):
            self._process.join(1)
            self.failure = f"the writer process ended with {self._process.exitcode}"
            return
        self._process.join(1)
        if isinstance(answer, Written):
            self.written = answer
        else:
            self.failure = str(answer)


def _write(plans: list[FolderPlan], checkpoint: Path, answer: Connection, parent: int) -> None:
    """The process: sends a `Written`, or what went wrong as text."""
    die_with_parent(parent)
    leave_signals_to_the_rank()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # the threads of the parent's pool are not here
    try:
        answer.send(_write_plans(plans, checkpoint))
    except Exception as error:
        answer.send(describe_failure(error))


def _write_plans(plans: list[FolderPlan], checkpoint: Path) -> Written:
    results: list[list[WriteResult]] = []
    checksums: dict[str, str] = {}
    for plan in plans:
        written: list[WriteResult] = []
        names = []
        if plan.common is not None:
            names.append(COMMON_STATE_FNAME)
            with open(checkpoint / plan.name / COMMON_STATE_FNAME, "wb") as file:
                torch.save(plan.common, file)
                file.flush()
                os.fsync(file.fileno())
        for bucket in plan.buckets:
            written += _write_bucket(plan.writer, bucket)
            names.append(bucket[1])
        results.append(written)
        checksums |= {f"{plan.name}/{name}": file_checksum(checkpoint / plan.name / name) for name in names}
    return Written(results, checksums)


def _write_bucket(writer: FileSystemWriterAsync, bucket: WriteBucket) -> list[WriteResult]:
    answers: queue.SimpleQueue[tuple[int, list[WriteResult] | Exception]] = queue.SimpleQueue()
    running: queue.Queue[int] = queue.Queue()
    running.put(0)
    FileSystemWriterAsync.write_preloaded_data(
        [writer.transforms], 0, bucket, answers, running, use_fsync=True
    )
    answer = answers.get_nowait()[1]
    if isinstance(answer, Exception):
        raise answer
    return answer


def describe_failure(error: BaseException) -> str:
    """The failing disk, where there is one under torch's own words, else the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return f"{cause.filename or 'the file system'}: {cause.strerror}"
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
