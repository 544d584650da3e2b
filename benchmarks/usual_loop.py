"""The usual way to tokenize a corpus for Megatron, as the yardstick: a loop over rows.

    python benchmarks/usual_loop.py --source wudao --corpus runs/bench/corpora/wudao \\
        --tokenizer runs/bench/tokenizer --output runs/bench/loop/wudao [--workers 2]

json.loads (or pyarrow's rows), `tokenizers` text by text, Megatron's own IndexedDatasetBuilder: what
Megatron-LM's preprocessing does, one output a file, with `--workers` processes over the files.
"""

import io
import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import tyro
import zstandard
from tokenizers import Tokenizer

from data_prep.corpus_sources import SOURCES, CorpusFile, find_files
from data_prep.errors import run_cli
from data_prep.text_tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class UsualLoopConfig:
    """Tokenize a source the usual way."""

    source: str
    """Which of the four."""
    corpus: Path
    """Its folder."""
    tokenizer: Path
    """Folder with a tokenizer.json."""
    output: Path
    """Folder for a .bin and .idx a file."""
    workers: int = 1
    """Processes."""


def texts_of(file: CorpusFile, source: str) -> Iterator[str]:
    """Row by row."""
    column = SOURCES[source].text_field
    if file.path.suffix == ".parquet":
        for rows in pq.ParquetFile(file.path).iter_batches(columns=[column]):
            yield from rows.column(0).to_pylist()
        return
    with file.path.open("rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw)
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            yield json.loads(line)[column]


@cache
def open_tokenizer(folder: Path) -> tuple[Tokenizer, int]:
    """The tokenizer and its EOS, opened once a process."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # as ours: control words in a document are text
    return tokenizer, load_tokenizer(folder).eos_id


def tokenize_file(job: tuple[CorpusFile, UsualLoopConfig]) -> None:
    """One file to one pair of .bin and .idx."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    file, config = job
    tokenizer, eos_id = open_tokenizer(config.tokenizer)
    prefix = config.output / file.relative_path.replace("/", "__")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for text in texts_of(file, config.source):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        ids.append(eos_id)
        builder.add_item(torch.IntTensor(ids))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def main() -> None:
    """Entry point."""
    config = tyro.cli(UsualLoopConfig, description=__doc__)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    config.output.mkdir(parents=True)
    jobs = [(file, config) for file in find_files(config.source, config.corpus)]
    if config.workers == 1:
        for job in jobs:
            tokenize_file(job)
        return
    with multiprocessing.get_context("spawn").Pool(config.workers) as pool:
        for _ in pool.imap_unordered(tokenize_file, jobs):
            pass


if __name__ == "__main__":
    run_cli(main)
