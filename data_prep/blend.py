"""Blend tokenized sources into training shards: the second of two steps from corpora to training data.

    python data_prep/blend.py --config configs/blend_demo.yaml [--plan-only]
    python data_prep/blend.py --total-tokens 100000000000 --output data/blend_100g
    python data_prep/blend.py --shards 0:20        one of ten processes, on as many machines as you like

`--config` (default configs/blend_200g.yaml) names a YAML file with the options below; flags override it.
First the plan is made from the manifests alone and shown as a table; a source that is too small is refused
unless repeats are allowed. Then `train/shard_00000.bin/.idx/.xxh` and so on are written, documents in a globally
shuffled order that depends on nothing but the seed and the manifests; every shard is itself a correct
blend, and so is the first half of them. The .xxh has checksums of the .bin's blocks, by which training checks what
it reads. Validation stays apart, one shard a source; train documents that are equal to any document of the sources'
validation splits are left out and counted. `tokenizer/` is a copy of the tokenizer. `blend.json` comes last and
lists everything. Training opens the folder with data_prep.blended_data.open_blend. An interrupted run goes on
with --resume.

Several processes may share the work, by --shards or as a Slurm job array (`sbatch --array=0-9`), where each
task takes its share by itself. The bytes are the same however the work is shared out. The process that has
shard 0 also writes validation and tokenizer, and the last one to finish writes `blend.json`.
"""

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from data_prep.blended_data import BLEND_FILE, BlendManifest
from data_prep.blending.folder import (
    copy_tokenizer_whole,
    list_blend,
    missing_parts,
    prefixes_of_task,
    refuse_other_shards,
    remove_blend,
)
from data_prep.blending.plan import BlendPlan, make_plan
from data_prep.blending.writer import BlendWriter
from data_prep.errors import UserError, run_cli
from data_prep.text_tokenizer import load_tokenizer
from data_prep.work_slice import work_slice

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "blend_200g.yaml"
# CoLA's blend: SlimPajama, StarCoder and Proof-Pile-2 at 0.8 of an older blend, WuDao at 0.2.
COLA_WEIGHTS = {"slimpajama": 0.3148672, "starcoder": 0.2451328, "wudao": 0.2, "proof_pile_2": 0.24}


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """Which sources, in which shares, and how much of them."""

    __pydantic_config__ = ConfigDict(
        extra="forbid"
    )  # a misspelt key in the file must not be a silent default

    tokenized: Path
    """Folder with one subfolder a source, as data_prep/tokenize_corpus.py wrote them."""
    tokenizer: Path
    """The tokenizer that made the tokens: its folder or file; copied into the output."""
    output: Path
    """Folder for the blend."""
    total_tokens: int
    """Train tokens in all, EOS of every document included."""
    shard_tokens: int = 1_000_000_000
    """Train tokens a shard, about."""
    validation_tokens: int = 2_000_000
    """Validation tokens taken from each source, at most."""
    weights: dict[str, float] = field(default_factory=lambda: dict(COLA_WEIGHTS))
    """Share of each source in the train tokens; scaled to a sum of 1, and 0 leaves a source out."""
    seed: int = 0
    """Seed of the global shuffle."""
    shards: str | None = None
    """Write only the train shards a:b, as in Python; default: all, or this task's share of a Slurm job array."""
    allow_repeats: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Use documents of a small source several times instead of refusing it."""
    plan_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the plan and stop."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with an interrupted blend: finished shards are kept."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start anew: a blend that is in the output folder is deleted first."""


def read_config(path: Path) -> BlendConfig:
    """Read a YAML file. Raises UserError that lists every unknown, missing or wrong key."""
    if not path.is_file():
        raise UserError(f"--config {path} does not exist; see the blend_*.yaml files in configs/")
    try:
        return TypeAdapter(BlendConfig).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or 'content'}: {item['msg']}" for item in error.errors()
        ]
        raise UserError(f"--config {path}: {'; '.join(problems)}") from error


def check_config(config: BlendConfig) -> None:
    """Raise UserError that lists everything wrong with the numbers and flags."""
    problems = [
        f"--{name.replace('_', '-')} {getattr(config, name)} must be at least 1"
        for name in ("total_tokens", "shard_tokens", "validation_tokens")
        if getattr(config, name) < 1
    ]
    problems += [
        f"--weights.{name} {weight} must not be negative"
        for name, weight in config.weights.items()
        if weight < 0
    ]
    problems += [
        f"--weights.{name}: a source is named by its folder in {config.tokenized}, which {name!r} is not"
        for name in config.weights
        if "/" in name or name in ("", ".", "..")
    ]
    if not any(weight > 0 for weight in config.weights.values()):
        problems.append("--weights needs a source with a weight above 0")
    if config.resume and config.overwrite:
        problems.append("--resume and --overwrite exclude each other; give one")
    is_slice = config.shards is not None or "SLURM_ARRAY_TASK_ID" in os.environ
    if is_slice and config.overwrite:
        problems.append("--overwrite would delete other tasks' shards; start the array in a new folder")
    if config.output.exists() and not (config.resume or config.overwrite or config.plan_only or is_slice):
        problems.append(
            f"--output {config.output} exists; pass --resume to go on or --overwrite to start anew"
        )
    if problems:
        raise UserError("; ".join(problems))


def plan_table(plan: BlendPlan) -> Table:
    """Show what is wanted of every source, and what there is."""
    title = (
        f"{plan.tokens_wanted:,} tokens in {plan.shard_count} shards, "
        f"{plan.tokens_wanted * plan.dtype.itemsize / 1e9:,.3g} GB"
    )
    table = Table("source", "weight", "available", "wanted", "epochs", "validation", title=title)
    for name, source in plan.train.items():
        table.add_row(
            name,
            f"{source.weight:.4f}",
            f"{source.split.tokens:,}",
            f"{source.tokens_wanted:,}",
            f"{source.epochs:.3f}",
            f"{min(plan.validation_tokens, plan.validation[name].tokens):,}",
        )
    return table


def blend(config: BlendConfig) -> BlendManifest | None:
    """Plan, show the plan, and write the blend unless only the plan is wanted.

    Returns:
        The blend's list; None where only the plan is wanted, or while other processes' shards are missing.

    Raises:
        UserError: bad settings or sources, or an output folder that may not be used. Finished shards stay,
            for --resume.
    """
    check_config(config)
    tokenizer = load_tokenizer(config.tokenizer)
    plan = make_plan(
        tokenized=config.tokenized,
        tokenizer=tokenizer,
        weights=config.weights,
        total_tokens=config.total_tokens,
        shard_tokens=config.shard_tokens,
        validation_tokens=config.validation_tokens,
        seed=config.seed,
        allow_repeats=config.allow_repeats,
    )
    Console().print(plan_table(plan))
    if config.plan_only:
        return None
    shards = work_slice(plan.shard_count, config.shards, os.environ)
    writer = BlendWriter(config.output, plan)
    if not config.overwrite:
        refuse_other_shards(config.output, plan)
    if config.overwrite or writer.missing(prefixes_of_task(plan, shards)):
        plan.check_files()
    if config.overwrite:
        remove_blend(config.output)
    config.output.mkdir(parents=True, exist_ok=True)
    if 0 in shards:
        copy_tokenizer_whole(config.tokenizer, config.output)
        writer.write_validation()
    writer.write_train(shards)
    missing = missing_parts(config.output, plan, writer)
    if missing:
        Console().print(
            f"{len(shards)} of {plan.shard_count} train shards are done; parts of the blend that are still missing: "
            f"{len(missing)}, the first is {missing[0]}. The last process to finish writes {BLEND_FILE}; when none is "
            "running any more, run again with --resume",
            soft_wrap=True,
        )
        return None
    return list_blend(config.output, plan, writer, tokenizer, config.tokenizer)


def parse_arguments(arguments: list[str]) -> BlendConfig:
    """Read the file that --config names, then let the other flags override it."""
    file_parser = argparse.ArgumentParser(add_help=False)
    file_parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    known, rest = file_parser.parse_known_args(arguments)
    return tyro.cli(BlendConfig, default=read_config(known.config), args=rest, description=__doc__)


def main() -> None:
    """Entry point."""
    config = parse_arguments(sys.argv[1:])
    manifest = blend(config)
    if manifest is not None:
        tokens = sum(shard.tokens for shard in manifest.train.shards)
        left_out = ", ".join(f"{count} {reason}" for reason, count in manifest.left_out.items()) or "none"
        Console().print(f"{tokens:,} train tokens in {config.output}; documents left out: {left_out}")


if __name__ == "__main__":
    run_cli(main)
