"""How fast models come in and go out, beside copying the same bytes, and how much memory that takes.

    python benchmarks/convert_bench.py     (make bench-convert)

Makes a random Llama of bf16 (8.4 GB), then, in turn and each as a whole process: copies its folder and waits for the
disk, imports it, exports the import. Files are read once before each turn, so that all three find them in the page
cache. At the end both conversions run once more with verification. Prints a table, writes `runs/bench/convert.json`.
"""

import os
import shutil
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import describe_machine
from benchmarks.measured_process import ProcessFigures, run_measured
from checkpoint_tools.formats.safetensors_files import open_safetensors, write_safetensors
from checkpoint_tools.formats.tensor_reader import TensorFacts
from data_prep.checksum_list import CHECKSUM_LIST
from data_prep.errors import UserError, run_cli
from data_prep.output_files import folder_written_whole, write_json_whole
from data_prep.progress import with_progress
from data_prep.sample_corpus import SampleCorpusConfig, make_corpora
from data_prep.train_tokenizer import TrainTokenizerConfig, train_tokenizer

GIB = 2**30
SHARD_BYTES = 2 * GIB
READ_BYTES = 1 << 24
# Of Llama-3.2-1B but for its depth and its head, which is its own.
SIZES: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
SMALL_SIZES = {
    **SIZES,
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
}
BARS = {
    "import_fraction_of_copy": 0.4,
    "export_fraction_of_copy": 0.4,
    "peak_rss_gib": "2 x largest tensor + 0.93",
}
COPY_PROGRAM = """
import os, shutil, sys
shutil.copytree(sys.argv[1], sys.argv[2])
for file in os.scandir(sys.argv[2]):
    os.fsync(os.open(file, os.O_RDONLY))
"""


@dataclass(frozen=True, kw_only=True)
class ConvertBenchConfig:
    """Compare both conversions with a copy."""

    folder: Path = Path("runs/bench")
    """Folder for everything that is written; the figures go to convert.json in it."""
    rounds: int = 3
    """How many times each has its turn; medians count."""
    small: bool = False
    """A tiny model, to see that it works; the figures say nothing and go to convert_small.json."""


class RandomWeights:
    """Tensors of a model that is nowhere whole: normal numbers, another seed for each."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        self.facts = {
            name: TensorFacts(tuple(t.shape), torch.bfloat16) for name, t in model.state_dict().items()
        }

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`; the same whenever it is read."""
        generator = torch.Generator().manual_seed(list(self.facts).index(name))
        return torch.empty(self.facts[name].shape, dtype=torch.bfloat16).normal_(
            0.0, 0.02, generator=generator
        )


def make_model(sizes: dict[str, Any], folder: Path) -> None:
    """Write the random model to `folder`, with a tokenizer; kept for the next time."""
    if folder.exists():
        return
    with folder_written_whole(folder) as partial:
        weights = RandomWeights(sizes)
        write_safetensors(partial, weights, list(weights.facts), SHARD_BYTES)
        (partial / CHECKSUM_LIST).unlink()  # a download has none
        LlamaConfig(**sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"]).save_pretrained(partial)
        make_corpora(SampleCorpusConfig(output=partial / "corpora", size_mb=1.0))
        train_tokenizer(
            TrainTokenizerConfig(corpora=partial / "corpora", output=partial / "tokenizer", vocab_size=1024)
        )
        for file in (partial / "tokenizer").iterdir():
            shutil.move(file, partial / file.name)
        shutil.rmtree(partial / "corpora")
        (partial / "tokenizer").rmdir()


class ConvertBench:
    """The three ways, as processes."""

    def __init__(self, work: Path) -> None:
        self.source, self.log = work / "model", work / "log.txt"
        self.outputs = {name: work / name for name in ("copy", "import", "export")}
        self.cores = len(os.sched_getaffinity(0))

    def measure(self, way: str, verify: bool = False) -> ProcessFigures:
        """One turn of `way`; its output stays until its next turn."""
        source = self.outputs["import"] if way == "export" else self.source
        shutil.rmtree(self.outputs[way], ignore_errors=True)
        _read_all(source)
        paths = [str(source), str(self.outputs[way])]
        commands = {
            "copy": ["-c", COPY_PROGRAM, *paths],
            "import": ["checkpoint_tools/hf_to_megatron.py", "--source", paths[0], "--output", paths[1]],
            "export": ["checkpoint_tools/megatron_to_hf.py", "--run", paths[0], "--output", paths[1]],
        }
        flags = [] if verify or way == "copy" else ["--no-verify"]
        return run_measured([*commands[way], *flags], self.cores, self.log)

    def came_back(self) -> bool:
        """Whether the export is, tensor by tensor, the model that was imported."""
        before, after = open_safetensors(self.source), open_safetensors(self.outputs["export"])
        return before.facts == after.facts and all(
            torch.equal(before.read(name), after.read(name)) for name in before.facts
        )


def _read_all(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.read(READ_BYTES):
                    pass


def run(config: ConvertBenchConfig) -> dict[str, Any]:
    """All of it; returns what convert.json holds."""
    work = config.folder / ("convert_small" if config.small else "convert")
    work.mkdir(parents=True, exist_ok=True)
    sizes = SMALL_SIZES if config.small else SIZES
    bench = ConvertBench(work)
    make_model(sizes, bench.source)
    turns: dict[str, list[ProcessFigures]] = {way: [] for way in bench.outputs}
    for way in with_progress([way for _ in range(config.rounds) for way in bench.outputs], "turns"):
        turns[way].append(bench.measure(way))
    if not bench.came_back():
        raise UserError(
            f"{bench.outputs['export']}: is not the model that was imported; the figures mean nothing"
        )
    verified = {way: bench.measure(way, verify=True) for way in ("import", "export")}
    facts = open_safetensors(bench.source).facts
    seconds = {
        way: statistics.median(turn.wall_seconds for turn in figures) for way, figures in turns.items()
    }
    peaks = {way: max(turn.peak_gib for turn in figures) for way, figures in turns.items()}
    for path in bench.outputs.values():
        shutil.rmtree(path)
    return {
        "import_fraction_of_copy": seconds["copy"] / seconds["import"],
        "export_fraction_of_copy": seconds["copy"] / seconds["export"],
        "peak_rss_gib": max(peaks["import"], peaks["export"]),
        "largest_tensor_gib": max(fact.bytes for fact in facts.values()) / GIB,
        "model_gb": sum(fact.bytes for fact in facts.values()) / 1e9,
        "seconds": seconds,
        "peak_gib": peaks,
        "verified_seconds": {way: figures.wall_seconds for way, figures in verified.items()},
        "verified_peak_gib": {way: figures.peak_gib for way, figures in verified.items()},
        "turns": {way: [asdict(turn) for turn in figures] for way, figures in turns.items()},
        "bars": BARS,
        "sizes": sizes,
        "machine": describe_machine(),
        "command": " ".join(["python", *sys.argv]),
    }


def table_of(content: dict[str, Any]) -> Table:
    """The figures, a way a row."""
    table = Table(
        "way", "seconds", "GB/s", "of a copy", "peak GiB", title=f"{content['model_gb']:.2f} GB of bf16"
    )
    for way, seconds in content["seconds"].items():
        fraction = content["seconds"]["copy"] / seconds
        rate = content["model_gb"] / seconds
        table.add_row(
            way, f"{seconds:.1f}", f"{rate:.2f}", f"{fraction:.2f}", f"{content['peak_gib'][way]:.2f}"
        )
    for way, seconds in content["verified_seconds"].items():
        rate = content["model_gb"] / seconds
        peak = content["verified_peak_gib"][way]
        table.add_row(f"{way}, verified", f"{seconds:.1f}", f"{rate:.2f}", "", f"{peak:.2f}")
    return table


def main() -> None:
    """Entry point."""
    config = tyro.cli(ConvertBenchConfig, description=__doc__)
    if config.rounds < 1:
        raise UserError(f"--rounds {config.rounds} must be at least 1")
    content = run(config)
    write_json_whole(config.folder / f"convert{'_small' if config.small else ''}.json", content)
    console = Console()
    console.print(table_of(content))
    console.print(f"largest tensor: {content['largest_tensor_gib']:.2f} GiB")


if __name__ == "__main__":
    run_cli(main)
