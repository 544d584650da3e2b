"""Which tokenizer library is fastest and exact, by kind of text: `make bench-tokenizers`.

    python benchmarks/tokenizer_bench.py --corpora runs/bench/corpora --tokenizer runs/bench/tokenizer

For Llama 3's vocabulary and for a sentencepiece vocabulary of 32,000 (trained on the same text), every engine
tokenizes the whole corpus, one process and one core each, from cold caches; the first 5 MB of every kind of text are
timed apart. Times are of the processor. Token streams are compared by checksum. Prints a table and writes
`runs/bench/tokenizers.json`.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
import xxhash
from rich.console import Console
from rich.table import Table

from benchmarks.engines import BYTE_LEVEL_ENGINES, SENTENCEPIECE_ENGINES
from benchmarks.machine import describe_machine
from data_prep.corpus_readers import read_batches
from data_prep.corpus_sources import SOURCES, find_files
from data_prep.errors import run_cli
from data_prep.output_files import new_folder, write_json_whole
from data_prep.progress import with_progress
from data_prep.train_tokenizer import build_twin, train_sentencepiece

COLD_BYTES = 5_000_000
SENTENCEPIECE_VOCABULARY = 32_000
SENTENCEPIECE_SAMPLE_BYTES = 3_000_000
LONGEST_SAMPLE_CHARACTERS = 100_000


@dataclass(frozen=True, kw_only=True)
class TokenizerBenchConfig:
    """Compare tokenizer libraries on the benchmark corpus."""

    corpora: Path = Path("runs/bench/corpora")
    """What benchmarks/bench_corpus.py made."""
    tokenizer: Path = Path("runs/bench/tokenizer")
    """What benchmarks/llama3_tokenizer.py made."""
    output: Path = Path("runs/bench/tokenizers.json")
    """The figures."""
    engines: tuple[str, ...] = tuple(
        [f"llama3/{name}" for name in BYTE_LEVEL_ENGINES]
        + [f"sentencepiece/{name}" for name in SENTENCEPIECE_ENGINES]
    )
    """Which to compare; the first of each vocabulary is the one the others' tokens are compared with."""
    measure: str | None = None
    """Measure one engine in this process and print its figures; used by the command itself."""


def batches(corpora: Path, source: str) -> Iterator[list[str]]:
    """All texts of a source, about a megabyte at a time."""
    for file in find_files(source, corpora / source):
        for batch in read_batches(file, SOURCES[source]):
            if batch.texts:
                yield batch.texts


def make_sentencepiece(corpora: Path, folder: Path) -> None:
    """Train a sentencepiece model on equal parts of the sources, with its twin tokenizer.json."""
    texts = []
    for source in SOURCES:
        room_bytes = SENTENCEPIECE_SAMPLE_BYTES
        for batch in batches(corpora, source):
            for text in batch:
                if len(text) < LONGEST_SAMPLE_CHARACTERS and room_bytes > 0:
                    texts.append(text)
                    room_bytes -= len(text.encode())
            if room_bytes <= 0:
                break
    with new_folder(
        folder, overwrite=True, is_ours=lambda path: (path / "tokenizer.model").is_file()
    ) as made:
        model = train_sentencepiece(texts, SENTENCEPIECE_VOCABULARY)
        (made / "tokenizer.model").write_bytes(model)
        build_twin(model).save(str(made / "tokenizer.json"))


def measure(corpora: Path, vocabulary: str, engine: str, folder: Path) -> dict[str, object]:
    """Tokenize everything with one engine in this process."""
    engines = BYTE_LEVEL_ENGINES if vocabulary == "llama3" else SENTENCEPIECE_ENGINES
    encode = engines[engine](folder)
    sources = {}
    for source in SOURCES:
        digest, text_bytes, tokens, seconds, cold_rate = xxhash.xxh3_128(), 0, 0, 0.0, 0.0
        for texts in batches(corpora, source):
            started = time.process_time()  # of all threads: what a core costs, whatever else the machine does
            ids = encode(texts)
            seconds += time.process_time() - started
            text_bytes += sum(len(text.encode()) for text in texts)
            tokens += len(ids)
            digest.update(np.ascontiguousarray(ids, np.uint32).data)
            if not cold_rate and text_bytes >= COLD_BYTES:
                cold_rate = text_bytes / 1e6 / seconds
        sources[source] = {
            "text_mb": text_bytes / 1e6,
            "tokens": tokens,
            "mb_per_second": text_bytes / 1e6 / seconds,
            "cold_mb_per_second": cold_rate,
            "xxh3_128": digest.hexdigest(),
        }
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"sources": sources, "peak_gib": peak_gib}


def run_engine(config: TokenizerBenchConfig, engine: str) -> dict[str, object]:
    """Measure an engine, as vocabulary/name, in a process of its own, on one core."""
    command = [sys.executable, __file__, "--measure", engine]
    command += ["--corpora", str(config.corpora), "--tokenizer", str(config.tokenizer)]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}),
    )
    return json.loads(done.stdout.splitlines()[-1])


def results_table(vocabulary: str, results: dict[str, dict]) -> Table:
    """Rates by engine and source, with whether the tokens are the same."""
    first = next(iter(results.values()))["sources"]
    table = Table(
        "engine", *SOURCES, "peak GiB", title=f"{vocabulary}: MB/s a core, whole corpus (first 5 MB)"
    )
    for engine, result in results.items():
        cells = []
        for source, figures in result["sources"].items():
            same = figures["xxh3_128"] == first[source]["xxh3_128"]
            rates = f"{figures['mb_per_second']:.1f} ({figures['cold_mb_per_second']:.1f})"
            cells.append(rates if same else f"{rates} other tokens")
        table.add_row(engine, *cells, f"{result['peak_gib']:.2f}")
    return table


def main() -> None:
    """Entry point."""
    config = tyro.cli(TokenizerBenchConfig, description=__doc__)
    sentencepiece_folder = config.tokenizer.with_name("sentencepiece")
    folders = {"llama3": config.tokenizer, "sentencepiece": sentencepiece_folder}
    if config.measure is not None:
        vocabulary, engine = config.measure.split("/")
        print(json.dumps(measure(config.corpora, vocabulary, engine, folders[vocabulary])))
        return
    if not sentencepiece_folder.is_dir():
        make_sentencepiece(config.corpora, sentencepiece_folder)
    results: dict[str, dict[str, dict]] = {}
    for name in with_progress(config.engines, "engines"):
        vocabulary, engine = name.split("/")
        results.setdefault(vocabulary, {})[engine] = run_engine(config, name)
    for vocabulary, by_engine in results.items():
        Console().print(results_table(vocabulary, by_engine))
    write_json_whole(config.output, {"machine": describe_machine(), "results": results})


if __name__ == "__main__":
    run_cli(main)
