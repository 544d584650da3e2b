"""Tokenize units in parallel processes, under one progress bar."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path

from data_prep.errors import UserError
from data_prep.process_ties import die_with_parent
from data_prep.progress import progress_bar
from data_prep.tokenize_unit import Unit, UnitOptions, UnitTokenizer
from data_prep.unit_manifest import UnitManifest

PROGRESS_SECONDS = 1.0


class ProgressBar:
    """A bar over the bytes of the input files, with the rates of text and tokens beside it."""

    def __init__(self, total_bytes: int, label: str) -> None:
        self._bar = progress_bar(label, total_bytes, unit="B", unit_scale=True)
        self._input_bytes, self._text_bytes, self._tokens = 0.0, 0, 0

    def add(self, input_bytes: float, text_bytes: int, tokens: int) -> None:
        """Take note of work done."""
        self.show(self._input_bytes + input_bytes, self._text_bytes + text_bytes, self._tokens + tokens)

    def show(self, input_bytes: float, text_bytes: int, tokens: int) -> None:
        """Show the work done since the start."""
        self._input_bytes, self._text_bytes, self._tokens = input_bytes, text_bytes, tokens
        seconds = max(self._bar.format_dict["elapsed"], 1e-9)
        rates = f"text {text_bytes / 1e6 / seconds:.1f} MB/s, {tokens / 1e6 / seconds:.2f} Mtokens/s"
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update(int(input_bytes) - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def use_one_thread() -> None:
    """Keep the tokenizers' libraries to this thread: parallelism is --workers, a file each."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")


_worker_tokenizer: UnitTokenizer
_worker_counts: SynchronizedArray


def start_worker(parent: int, tokenizer_path: Path, options: UnitOptions, counts: SynchronizedArray) -> None:
    """Set up a worker process: its own tokenizer on one core, and the counters that all workers share."""
    global _worker_tokenizer, _worker_counts
    die_with_parent(parent)
    use_one_thread()
    _worker_tokenizer = UnitTokenizer(tokenizer_path, options)
    _worker_counts = counts


def work_on(unit: Unit) -> list[UnitManifest]:
    """Tokenize one unit in a worker process."""

    def report(*amounts: float) -> None:
        with _worker_counts.get_lock():
            for index, amount in enumerate(amounts):
                _worker_counts[index] += amount

    return _worker_tokenizer.tokenize(unit, report)


def run_in_processes(
    units: list[Unit],
    tokenizer_path: Path,
    options: UnitOptions,
    workers: int,
    bar: ProgressBar,
    take: Callable[[list[UnitManifest]], None],
) -> None:
    """Tokenize units in parallel; after the first error units in work are finished and no more are begun.

    Args:
        units: the work.
        tokenizer_path, options: what each worker opens.
        workers: processes.
        bar: shows the progress of all together.
        take: is given the manifests of each finished unit.

    Raises:
        UserError: a bad input file, or a worker that was killed.
    """
    context = multiprocessing.get_context("spawn")  # forking a process with threads can lock up
    counts = context.Array("d", 3)
    largest_first = sorted(units, key=lambda unit: -unit.file.size_bytes)
    arguments = (os.getpid(), tokenizer_path, options, counts)
    with ProcessPoolExecutor(workers, context, start_worker, arguments) as pool:
        pending = {pool.submit(work_on, unit) for unit in largest_first}
        try:
            while pending:
                done, pending = wait(pending, timeout=PROGRESS_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    take(future.result())
                bar.show(counts[0], int(counts[1]), int(counts[2]))
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was killed (out of memory?); use fewer --workers, then --resume"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
