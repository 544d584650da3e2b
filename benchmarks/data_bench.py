"""How fast corpora become token shards, beside the usual loop, datatrove and the machine's own limit.

    python benchmarks/data_bench.py     (make bench-data)

needs `benchmarks/bench_corpus.py` and `benchmarks/llama3_tokenizer.py` run before. Each way turns the same compressed
files in the sources' own formats into token files, as whole processes, on one core and on two. Ours and the limit are
timed several times and the median is taken; the two yardsticks, which take many minutes, once. The tokens of all three
are compared. Then a blend of the tokens is timed beside copying it. Prints tables and writes `runs/bench/data.json`.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.measured_process import ProcessFigures, add_figures, run_measured
from benchmarks.token_digest import TokenDigest, datatrove_documents, digest_documents, indexed_documents
from data_prep.blend import COLA_WEIGHTS
from data_prep.blended_data import open_blend
from data_prep.corpus_sources import SOURCES
from data_prep.errors import IntegrityError, run_cli
from data_prep.output_files import read_json_object, write_json_whole
from data_prep.progress import with_progress
from data_prep.unit_manifest import read_unit_manifest

CORES = (1, 2)


@dataclass(frozen=True, kw_only=True)
class DataBenchConfig:
    """Time the data preparation beside two yardsticks and the physical limit."""

    corpora: Path = Path("runs/bench/corpora")
    """What benchmarks/bench_corpus.py made."""
    tokenizer: Path = Path("runs/bench/tokenizer")
    """What benchmarks/llama3_tokenizer.py made."""
    folder: Path = Path("runs/bench")
    """Folder for everything that is written; the figures go to data.json in it."""
    repeats: int = 3
    """Runs of ours, of the limit, of the blend and of the copy."""
    without_yardsticks: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave the loop and datatrove out, which take most of the time."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way from corpora to tokens."""

    name: str
    command: Callable[[str, Path, int], list[str]]
    """Arguments for a source, an output folder and a number of workers."""
    repeats: int


def ways_of(config: DataBenchConfig, tokens: dict[str, int]) -> list[Way]:
    """Ours, the limit and the two yardsticks. `tokens`: of each source, for the limit to write as many."""

    def ours(source: str, output: Path, workers: int) -> list[str]:
        flags = ["--source", source, "--input", str(config.corpora / source), "--workers", str(workers)]
        flags += ["--tokenizer", str(config.tokenizer), "--output", str(output)]
        return ["data_prep/tokenize_corpus.py", *flags]

    def yardstick(script: str) -> Callable[[str, Path, int], list[str]]:
        def command(source: str, output: Path, workers: int) -> list[str]:
            flags = ["--source", source, "--corpus", str(config.corpora / source), "--output", str(output)]
            flags += ["--tokenizer", str(config.tokenizer), "--workers", str(workers)]
            return [f"benchmarks/{script}.py", *flags]

        return command

    def limit(source: str, output: Path, workers: int) -> list[str]:
        flags = ["--source", source, "--corpus", str(config.corpora / source), "--output", str(output)]
        return ["benchmarks/physical_limit.py", *flags, "--tokens", str(tokens[source])]

    ways = [
        Way(name="ours", command=ours, repeats=config.repeats),
        Way(name="limit", command=limit, repeats=config.repeats),
    ]
    if not config.without_yardsticks:
        ways.append(Way(name="loop", command=yardstick("usual_loop"), repeats=1))
        ways.append(Way(name="datatrove", command=yardstick("datatrove_pipeline"), repeats=1))
    return ways


def median_figures(runs: list[ProcessFigures]) -> ProcessFigures:
    """Median of each figure; the peak is the largest."""
    return ProcessFigures(
        wall_seconds=statistics.median(run.wall_seconds for run in runs),
        cpu_seconds=statistics.median(run.cpu_seconds for run in runs),
        peak_gib=max(run.peak_gib for run in runs),
    )


def time_way(config: DataBenchConfig, way: Way, cores: int) -> dict[str, ProcessFigures]:
    """Turn each source into tokens; median figures by source. The last run's output stays."""
    figures = {}
    for source in SOURCES:
        output = config.folder / way.name / source
        runs = []
        for _ in range(way.repeats):
            shutil.rmtree(output, ignore_errors=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            log = config.folder / f"{way.name}.log"
            runs.append(run_measured(way.command(source, output, cores), cores, log))
        figures[source] = median_figures(runs)
    return figures


def check_same_tokens(config: DataBenchConfig, names: list[str]) -> TokenDigest:
    """Compare what the ways wrote. Raises IntegrityError when they wrote other tokens than ours."""
    digests = {}
    for name in names:
        read = datatrove_documents if name == "datatrove" else indexed_documents
        digests[name] = digest_documents(read(config.folder / name))
    different = {name: digest for name, digest in digests.items() if digest != digests["ours"]}
    if different:
        raise IntegrityError(f"other tokens than ours, {digests['ours']}: {different}")
    return digests["ours"]


def time_blend(config: DataBenchConfig, tokens: dict[str, int]) -> dict[str, float]:
    """Blend the tokens on one core, and copy what was written, in turn; medians."""
    output, copy = config.folder / "blend", config.folder / "copy"
    # Nearly two epochs of the smallest source, so that start-up does not hide the speed.
    total = int(1.8 * min(tokens[source] / weight for source, weight in COLA_WEIGHTS.items()))
    flags = ["--tokenized", str(config.folder / "ours"), "--tokenizer", str(config.tokenizer)]
    flags += ["--output", str(output), "--total-tokens", str(total), "--allow-repeats"]
    blends, copies, written_bytes = [], [], 0
    for _ in range(config.repeats):
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(copy, ignore_errors=True)
        blends.append(run_measured(["data_prep/blend.py", *flags], 1, config.folder / "blend.log"))
        shards = [Path(prefix) for prefix in open_blend(output).train_prefixes]
        copy.mkdir()
        started = time.monotonic()
        written_bytes = 0
        for prefix in shards:
            for ending in (".bin", ".idx", ".xxh"):
                source = prefix.with_name(prefix.name + ending)
                shutil.copyfile(source, copy / source.name)
                with (copy / source.name).open("rb") as stream:
                    os.fsync(stream.fileno())
                written_bytes += source.stat().st_size
        copies.append(time.monotonic() - started)
    blend, copied = median_figures(blends), statistics.median(copies)
    return {
        "written_mb": written_bytes / 1e6,
        "blend_seconds": blend.wall_seconds,
        "blend_peak_gib": blend.peak_gib,
        "copy_seconds": copied,
        "blend_fraction_of_copy": copied / blend.wall_seconds,
    }


def rates_table(results: dict[str, dict[str, dict[str, ProcessFigures]]], text_mb: dict[str, float]) -> Table:
    """A row a way and number of cores: MB/s by source and in all."""
    table = Table(
        "way",
        "cores",
        *SOURCES,
        "all MB/s",
        "CPU s",
        "peak GiB",
        title="MB of text a second, whole processes",
    )
    for name, by_cores in results.items():
        for cores, by_source in by_cores.items():
            total = add_figures(list(by_source.values()))
            cells = [f"{text_mb[source] / by_source[source].wall_seconds:.1f}" for source in SOURCES]
            table.add_row(
                name,
                cores,
                *cells,
                f"{sum(text_mb.values()) / total.wall_seconds:.1f}",
                f"{total.cpu_seconds:.0f}",
                f"{total.peak_gib:.2f}",
            )
    return table


def ratios_of(results: dict[str, dict[str, dict[str, ProcessFigures]]]) -> dict[str, float]:
    """How many times as fast ours is, by cores; and the share of the limit."""
    seconds = {
        (name, cores): add_figures(list(by_source.values())).wall_seconds
        for name, by_cores in results.items()
        for cores, by_source in by_cores.items()
    }
    ratios = {"fraction_of_limit": seconds["limit", "1"] / seconds["ours", "1"]}
    for name, per_core in (("loop", "ratio_to_loop_per_core"), ("datatrove", "ratio_to_datatrove")):
        if name in results:
            ratios[per_core] = seconds[name, "1"] / seconds["ours", "1"]
            ratios[f"ratio_to_{name}_two_cores"] = seconds[name, "2"] / seconds["ours", "2"]
    return ratios


def tokens_of(folder: Path) -> dict[str, int]:
    """Train and validation tokens of each source, from the manifests of ours."""
    return {
        source: sum(read_unit_manifest(path).tokens for path in (folder / source).glob("*/*.json"))
        for source in SOURCES
    }


def main() -> None:
    """Entry point."""
    config = tyro.cli(DataBenchConfig, description=__doc__)
    corpora = read_json_object(config.corpora / "corpora.json", "run benchmarks/bench_corpus.py")
    text_mb = {name: figures["text_bytes"] / 1e6 for name, figures in corpora["sources"].items()}  # type: ignore[attr-defined]
    time_way(config, ways_of(config, {})[0], cores=1)  # warms the page cache and counts the tokens
    tokens = tokens_of(config.folder / "ours")
    ways = ways_of(config, tokens)
    results: dict[str, dict[str, dict[str, ProcessFigures]]] = {way.name: {} for way in ways}
    for way, cores in with_progress([(way, cores) for cores in CORES for way in ways], "ways"):
        if (way.name, cores) != ("limit", 2):
            results[way.name][str(cores)] = time_way(config, way, cores)
    digest = check_same_tokens(config, [way.name for way in ways if way.name != "limit"])
    blend = time_blend(config, tokens)
    ratios = ratios_of(results)
    console = Console()
    console.print(rates_table(results, text_mb))
    figures = {**ratios, **blend}
    console.print("\n".join(f"{name:28s} {value:.3f}" for name, value in figures.items()))
    content = {
        **figures,
        "machine": describe_machine(),
        "corpus": {"text_mb": text_mb, **digest._asdict()},
        "rates": {
            name: {
                cores: {
                    source: {"mb_per_second": text_mb[source] / part.wall_seconds, **asdict(part)}
                    for source, part in by_source.items()
                }
                for cores, by_source in by_cores.items()
            }
            for name, by_cores in results.items()
        },
    }
    write_json_whole(config.folder / "data.json", content)


if __name__ == "__main__":
    run_cli(main)
