"""datatrove's tokenization pipeline over a source, as the second yardstick.

    python benchmarks/datatrove_pipeline.py --source wudao --corpus runs/bench/corpora/wudao \\
        --tokenizer runs/bench/tokenizer --output runs/bench/datatrove/wudao [--workers 2]

Its readers and its DocumentTokenizer as documented, without shuffling; one task a worker.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from data_prep.corpus_sources import SOURCES
from data_prep.errors import run_cli
from data_prep.text_tokenizer import PREFERRED_EOS_TOKEN


@dataclass(frozen=True, kw_only=True)
class DatatroveConfig:
    """Tokenize a source with datatrove."""

    source: str
    """Which of the four."""
    corpus: Path
    """Its folder."""
    tokenizer: Path
    """Folder with a tokenizer.json."""
    output: Path
    """Folder for the .ds files."""
    workers: int = 1
    """Processes."""


def main() -> None:
    """Entry point."""
    config = tyro.cli(DatatroveConfig, description=__doc__)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    source = SOURCES[config.source]
    reader_class, pattern = (
        (ParquetReader, "**/*.parquet") if "*.parquet" in source.patterns else (JsonlReader, "**/*.jsonl.zst")
    )
    reader = reader_class(str(config.corpus), glob_pattern=pattern, text_key=source.text_field)
    writer = DocumentTokenizer(
        str(config.output / "tokens"),
        tokenizer_name_or_path=str(config.tokenizer / "tokenizer.json"),
        eos_token=PREFERRED_EOS_TOKEN,
        shuffle_documents=False,
    )
    LocalPipelineExecutor(
        pipeline=[reader, writer],
        tasks=config.workers,
        workers=config.workers,
        logging_dir=str(config.output / "logs"),
    ).run()


if __name__ == "__main__":
    run_cli(main)
