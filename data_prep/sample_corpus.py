"""Make a small sample of the four corpora, in the formats in which they are published, without a download.

    python data_prep/sample_corpus.py --output runs/demo/corpora [--size-mb 36] [--seed 0] [--overwrite]

writes `slimpajama/{train,validation}/chunk*/*.jsonl.zst`, `starcoder/<language>/*.parquet`,
`proof_pile_2/{algebraic-stack,arxiv,open-web-math}/{train,validation}/*.jsonl.zst`, `wudao/*.parquet` and
`corpora.json`, which says what is in them. The code is Python's own standard library, the rest comes from the
generators in `data_prep/sample_text/`. The same seed, size and Python installation give the same files.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
import zstandard
from rich.console import Console
from rich.table import Table

from data_prep.errors import UserError, run_cli
from data_prep.output_files import new_folder, write_json_whole
from data_prep.sample_text import chinese, english, mathematics, python_sources

# Shares of the size: somewhat more than the blend's weights where a token takes more bytes.
SHARES = {"slimpajama": 0.32, "starcoder": 0.24, "proof_pile_2": 0.25, "wudao": 0.19}
DOCUMENTATION_SHARE = 0.15  # of SlimPajama: real English text about Python
GITHUB_ROW_CHANCE = 0.02  # SlimPajama rows that a reader must drop
HEADER_SHARE = 0.09  # of StarCoder: C headers
VALIDATION_SHARE = 0.05  # of the sources that are published with a validation split
SET_WEIGHTS = {"RedPajamaCommonCrawl": 5, "RedPajamaC4": 3, "RedPajamaWikipedia": 2, "RedPajamaBook": 1}
SET_WEIGHTS["RedPajamaStackExchange"] = 2
SUBSET_SHARES = {"algebraic-stack": 0.25, "arxiv": 0.4, "open-web-math": 0.35}
MINIMUM_SIZE_MB = 0.1
MARKER_FILE = "corpora.json"

Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class SampleCorpusConfig:
    """Make sample corpora for the demo and the tests: real formats, generated text, no download."""

    output: Path
    """Folder to make; it gets one subfolder a source."""
    size_mb: float = 36.0
    """Text in all four sources together, in megabytes (10^6 bytes of UTF-8) before compression."""
    seed: int = 0
    """Seed of the generators; another seed gives other documents."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace a folder that an earlier run of this command made."""


class DocumentCollector:
    """Takes documents until a size is reached and never the same text twice, over all sources."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def take(self, rows: Iterator[Row], text_field: str, size_bytes: float) -> list[Row]:
        """Return new rows whose texts have at least `size_bytes` together, or all that there are."""
        taken: list[Row] = []
        for row in rows:
            text = str(row[text_field])
            if size_bytes <= 0:
                break
            encoded = text.encode()
            if (digest := hashlib.blake2b(encoded, digest_size=16).digest()) not in self._seen:
                self._seen.add(digest)
                taken.append(row)
                size_bytes -= len(encoded)
        return taken


def split_evenly(rows: list[Row], parts: int) -> list[list[Row]]:
    """Cut rows into `parts` runs of about equal length, none of them empty."""
    parts = max(1, min(parts, len(rows)))
    return [rows[len(rows) * part // parts : len(rows) * (part + 1) // parts] for part in range(parts)]


def write_jsonl_zst(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON lines in one zstandard frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(zstandard.ZstdCompressor(level=3).compress(lines.encode()))


def write_parquet_parts(folder: Path, rows: list[Row], parts: int) -> None:
    """Write rows as `train-00000-of-0000N.parquet` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = split_evenly(rows, parts)
    for number, piece in enumerate(pieces):
        table = pa.Table.from_pylist(piece)
        pq.write_table(table, folder / f"train-{number:05d}-of-{len(pieces):05d}.parquet", compression="zstd")


def github_row(rng: random.Random) -> str:
    """A configuration file such as SlimPajama's GitHub part holds; readers drop these rows."""
    name = f"{rng.choice(['web', 'data', 'game', 'chat'])}-{rng.choice(['server', 'client', 'tool'])}"
    version = ".".join(str(rng.randint(0, 20)) for _ in range(3))
    scripts = {
        "build": "tsc",
        "test": f"jest --maxWorkers={rng.randint(1, 64)}",
        "port": rng.randint(1024, 65535),
    }
    return json.dumps({"name": name, "version": version, "scripts": scripts}, indent=2)


def slimpajama_rows(rng: random.Random) -> Iterator[Row]:
    """Endless rows of web text, books, encyclopaedia entries and questions, a few of them to be dropped."""
    names, weights = list(SET_WEIGHTS), list(SET_WEIGHTS.values())
    while True:
        set_name = "RedPajamaGithub" if rng.random() < GITHUB_ROW_CHANCE else rng.choices(names, weights)[0]
        generators = english.SETS.get(set_name, (github_row,))
        yield {"text": rng.choice(generators)(rng), "meta": {"redpajama_set_name": set_name}}


def make_slimpajama(
    folder: Path, size_bytes: float, rng: random.Random, collector: DocumentCollector
) -> None:
    """Two chunks of two files for training, one file for validation."""
    manuals: Iterator[Row] = (
        {"text": text, "meta": {"redpajama_set_name": "RedPajamaCommonCrawl"}}
        for text in python_sources.documentation(rng)
    )
    rows = collector.take(manuals, "text", DOCUMENTATION_SHARE * size_bytes)
    rows += collector.take(slimpajama_rows(rng), "text", (1 - DOCUMENTATION_SHARE) * size_bytes)
    rng.shuffle(rows)
    held_out = max(1, int(VALIDATION_SHARE * len(rows)))
    for number, part in enumerate(split_evenly(rows[held_out:], 4)):
        write_jsonl_zst(folder / f"train/chunk{number // 2 + 1}/example_train_{number % 2}.jsonl.zst", part)
    write_jsonl_zst(folder / "validation/chunk1/example_holdout_0.jsonl.zst", rows[:held_out])


def starcoder_rows(language: str, files: Iterator[tuple[str, str]]) -> Iterator[Row]:
    """Rows with the columns of starcoderdata."""
    for number, (path, text) in enumerate(files):
        yield {
            "max_stars_repo_path": path,
            "max_stars_repo_name": "python/cpython",
            "max_stars_count": 0,
            "id": f"{language}-{number}",
            "content": text,
        }


def make_starcoder(folder: Path, size_bytes: float, rng: random.Random, collector: DocumentCollector) -> None:
    """Python in three files, C in one. No validation split, as published."""
    headers = collector.take(
        starcoder_rows("c", python_sources.c_headers(rng)), "content", HEADER_SHARE * size_bytes
    )
    size_bytes -= sum(len(str(row["content"]).encode()) for row in headers)
    modules = collector.take(
        starcoder_rows("python", python_sources.python_modules(rng)), "content", size_bytes
    )
    write_parquet_parts(folder / "python", modules, 3)
    if headers:
        write_parquet_parts(folder / "c", headers, 1)


def make_proof_pile_2(
    folder: Path, size_bytes: float, rng: random.Random, collector: DocumentCollector
) -> None:
    """Its three subsets, each with a training and a validation part."""

    def rows(subset: str) -> Iterator[Row]:
        generators = mathematics.SUBSETS[subset]
        while True:
            yield {"text": rng.choice(generators)(rng), "meta": {"subset_name": subset}}

    for subset, share in SUBSET_SHARES.items():
        taken = collector.take(rows(subset), "text", share * size_bytes)
        held_out = max(1, int(VALIDATION_SHARE * len(taken)))
        for number, part in enumerate(split_evenly(taken[held_out:], 2)):
            write_jsonl_zst(folder / subset / f"train/{subset}_{number:04d}.jsonl.zst", part)
        write_jsonl_zst(folder / subset / f"validation/{subset}_0000.jsonl.zst", taken[:held_out])


def make_wudao(folder: Path, size_bytes: float, rng: random.Random, collector: DocumentCollector) -> None:
    """Chinese text in three files. No validation split, as published."""

    def rows() -> Iterator[Row]:
        while True:
            title, content = rng.choice(chinese.GENERATORS)(rng)
            yield {"title": title, "content": content}

    write_parquet_parts(folder, collector.take(rows(), "content", size_bytes), 3)


MAKERS: dict[str, Callable[[Path, float, random.Random, DocumentCollector], None]] = {
    "slimpajama": make_slimpajama,
    "starcoder": make_starcoder,
    "proof_pile_2": make_proof_pile_2,
    "wudao": make_wudao,
}


def make_corpora(config: SampleCorpusConfig) -> dict[str, dict[str, int]]:
    """Write the four corpora; return files and compressed bytes of each.

    Raises:
        UserError: the size is too small, or the output exists and may not be replaced.
    """
    if config.size_mb < MINIMUM_SIZE_MB:
        raise UserError(f"--size-mb {config.size_mb} is too small; give at least {MINIMUM_SIZE_MB}")
    collector = DocumentCollector()
    summary: dict[str, dict[str, int]] = {}
    with new_folder(
        config.output, overwrite=config.overwrite, is_ours=lambda path: (path / MARKER_FILE).is_file()
    ) as folder:
        for source, make in MAKERS.items():
            # One stream of random numbers a source, so that a change in one leaves the others as they are.
            rng = random.Random(f"{config.seed} {source}")
            make(folder / source, SHARES[source] * config.size_mb * 1e6, rng, collector)
            files = [path for path in (folder / source).rglob("*") if path.is_file()]
            summary[source] = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
        write_json_whole(
            folder / MARKER_FILE, {"seed": config.seed, "size_mb": config.size_mb, "sources": summary}
        )
    return summary


def main() -> None:
    """Entry point."""
    config = tyro.cli(SampleCorpusConfig, description=__doc__)
    summary = make_corpora(config)
    table = Table("source", "files", "compressed MB", title=f"sample corpora in {config.output}")
    for source, figures in summary.items():
        table.add_row(source, str(figures["files"]), f"{figures['bytes'] / 1e6:.1f}")
    Console().print(table)


if __name__ == "__main__":
    run_cli(main)
