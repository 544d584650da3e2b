"""What the training benchmark trains on: sizes, text in token shards, recipes, and the checkpoints stages start from.

The sizes keep the proportions of Llama-3.1-8B at half its depth: a head of 1.2 blocks' work, 3.8 % of a block's work in
attention, and IDM, merge and policy of half the layers of the 8B recipes.
"""

import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.measured_process import run_measured
from data_prep.blend import BlendConfig, blend
from data_prep.blended_data import BLEND_FILE
from data_prep.corpus_sources import SOURCES
from data_prep.output_files import write_text_whole
from data_prep.sample_corpus import SampleCorpusConfig, make_corpora
from data_prep.tokenize_corpus import TokenizeConfig, tokenize_corpus
from data_prep.train_tokenizer import TrainTokenizerConfig, train_tokenizer
from pretrain.config import CONFIG_FILE, ActionConfig, ModelConfig, RunConfig, StageName
from pretrain.recipes import dump_recipe, recipe_from_fields

# The stage whose checkpoint each stage starts from.
START_OF: dict[StageName, StageName | None] = {"base": None, "idm": "base", "policy": "idm"}
# One more than are read ahead, so that the last timed step has as much to do as the others.
SPARE_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class TrainBenchSizes:
    """One model and its batches, for every way alike."""

    vocab_size: int
    """Tokens of the vocabulary."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the MLPs."""
    num_layers: int
    """Decoder blocks of the base."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key/value heads."""
    head_size: int
    """Width of one attention head."""
    num_idm_layers: int
    """Decoder blocks of the IDM."""
    num_merge_layers: int
    """Merge MLPs of the world model."""
    num_policy_layers: int
    """Decoder blocks of the policy."""
    sequence_length: int
    """Tokens a sample."""
    micro_batch_size: int
    """Sequences at once."""
    base_micro_batch_size: int
    """Sequences at once through a frozen base, where the way has it apart."""
    global_batch_size: int
    """Sequences a step."""
    corpus_mb: float
    """Text of the sample corpora, 10^6 bytes; the tokenizer is trained on it too."""
    train_tokens: int
    """Tokens of the blend."""


DEFAULT_SIZES = TrainBenchSizes(
    vocab_size=8192,
    hidden_size=512,
    ffn_hidden_size=1792,
    num_layers=16,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_size=64,
    num_idm_layers=2,
    num_merge_layers=1,
    num_policy_layers=4,
    sequence_length=256,
    micro_batch_size=4,
    base_micro_batch_size=8,
    global_batch_size=8,
    corpus_mb=12,
    train_tokens=800_000,
)
SMALL_SIZES = TrainBenchSizes(
    vocab_size=1024,
    hidden_size=64,
    ffn_hidden_size=160,
    num_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_size=16,
    num_idm_layers=1,
    num_merge_layers=1,
    num_policy_layers=2,
    sequence_length=32,
    micro_batch_size=2,
    base_micro_batch_size=4,
    global_batch_size=4,
    corpus_mb=1.5,
    train_tokens=100_000,
)


def bench_recipe(
    sizes: TrainBenchSizes, folder: Path, stage: StageName, steps: int, run_name: str
) -> RunConfig:
    """The recipe of one run in `folder`/`run_name`: one rank, fp32, nothing logged or saved between steps."""
    values, start = asdict(sizes), START_OF[stage]
    sections = {
        section: {field.name: values[field.name] for field in fields(kind) if field.name in values}
        for section, kind in (("model", ModelConfig), ("actions", ActionConfig))
    }
    return recipe_from_fields(
        {
            "stage": stage,
            "run_folder": str(folder / run_name),
            "start_from": str(folder / start_name(start)) if start else None,
            "model": sections["model"] | {"rope_scaling_factor": 8.0},
            "actions": sections["actions"],
            "data": {"path": str(data_folder(sizes, folder)), "sequence_length": sizes.sequence_length},
            "training": {
                "steps": steps,
                "global_batch_size": sizes.global_batch_size,
                "micro_batch_size": sizes.micro_batch_size,
                "base_micro_batch_size": None if stage == "base" else sizes.base_micro_batch_size,
                "precision": "fp32",
            },
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "decay_steps": 1000},
            "validation": {"steps": 1},
            "logging": {"wandb": "off"},
        },
        "benchmark",
    )


def start_name(stage: StageName) -> str:
    """Run folder, beside the others, of the run of one step that later stages start from."""
    return f"start_{stage}"


def data_folder(sizes: TrainBenchSizes, folder: Path) -> Path:
    """Where the blend of these sizes is kept from one benchmark to the next."""
    return folder / f"data_{sizes.vocab_size}_{sizes.train_tokens}" / "blend"


def make_data(sizes: TrainBenchSizes, folder: Path) -> None:
    """Sample corpora to a blend, by the real steps of data_prep; nothing where it is there already."""
    output = data_folder(sizes, folder)
    if (output / BLEND_FILE).is_file():
        return
    shutil.rmtree(output.parent, ignore_errors=True)
    corpora, tokenizer, tokenized = (output.with_name(name) for name in ("corpora", "tokenizer", "tokenized"))
    make_corpora(SampleCorpusConfig(output=corpora, size_mb=sizes.corpus_mb))
    train_tokenizer(TrainTokenizerConfig(corpora=corpora, output=tokenizer, vocab_size=sizes.vocab_size))
    for source in SOURCES:
        tokenize_corpus(
            TokenizeConfig(
                source=source, input=str(corpora / source), tokenizer=tokenizer, output=tokenized / source,
                validation_fraction=0.2,
            )
        )  # fmt: skip
    blend(
        BlendConfig(
            tokenized=tokenized, tokenizer=tokenizer, output=output, total_tokens=sizes.train_tokens,
            shard_tokens=sizes.train_tokens, validation_tokens=4_000,
        )
    )  # fmt: skip


def make_starts(sizes: TrainBenchSizes, folder: Path, log: Path) -> None:
    """Train base and IDM for one step each by the real command, for the stages to start from; cached."""
    made_anew = False
    for stage in ("base", "idm"):
        recipe = bench_recipe(sizes, folder, stage, 1, start_name(stage))
        saved = recipe.run_folder / CONFIG_FILE
        is_whole = any(recipe.run_folder.glob("checkpoints/step_*[0-9]/cola.json"))
        if is_whole and not made_anew and saved.is_file() and saved.read_text() == dump_recipe(recipe):
            continue
        made_anew = True  # what starts from it is old then too
        path = write_recipe(recipe, folder)
        overwrite = ["--overwrite"] if saved.is_file() else []
        run_measured(["-m", "pretrain.train", str(path), *overwrite], 1, log)


def write_recipe(recipe: RunConfig, folder: Path) -> Path:
    """Write a recipe into `folder` under its run folder's name; returns the file."""
    path = folder / f"{recipe.run_folder.name}.yaml"
    write_text_whole(path, dump_recipe(recipe))
    return path
