"""What no tokenizer can beat: read, decompress and parse a source, and write as many bytes as its tokens take.

    python benchmarks/physical_limit.py --source wudao --corpus runs/bench/corpora/wudao \\
        --tokens 46672316 --output runs/bench/limit/wudao
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from data_prep.corpus_readers import read_batches
from data_prep.corpus_sources import SOURCES, find_files
from data_prep.errors import run_cli
from data_prep.indexed_shards import ShardWriter


@dataclass(frozen=True, kw_only=True)
class PhysicalLimitConfig:
    """Read a source and write zeros in place of its tokens."""

    source: str
    """Which of the four."""
    corpus: Path
    """Its folder."""
    tokens: int
    """Tokens to write in all."""
    output: Path
    """Folder for a shard a file."""


def main() -> None:
    """Entry point."""
    config = tyro.cli(PhysicalLimitConfig, description=__doc__)
    files = find_files(config.source, config.corpus)
    size_bytes = sum(file.size_bytes for file in files)
    for file in files:
        share = file.size_bytes / size_bytes
        with ShardWriter(config.output / file.unit, np.dtype(np.int32)) as writer:
            done = 0.0
            for batch in read_batches(file, SOURCES[config.source]):
                tokens = round((batch.progress - done) * share * config.tokens)
                done = batch.progress
                writer.add(np.zeros(tokens, np.int32))
            writer.publish()


if __name__ == "__main__":
    run_cli(main)
