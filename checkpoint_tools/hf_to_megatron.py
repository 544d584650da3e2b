"""Import a Hugging Face folder as a checkpoint that training can start from, on any layout of ranks.

    python checkpoint_tools/hf_to_megatron.py --source Llama-3.1-8B --output runs/llama31_8b/base
    python checkpoint_tools/hf_to_megatron.py --source Llama-3.1-CoLA-10B --output runs/cola_10b

Reads bases (Llama 2, 3, 3.1, 3.2; Qwen2.5; Mistral), CoLA exports of ours, and the layout of the published CoLA
weights. A base serves as `start_from` of stage idm; a CoLA model as `start_from` of the stage after its parts, and as
`init_from` of the stage that trains them. Tensors pass through one at a time: memory holds the largest, not the model.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

from checkpoint_tools.formats.converted_reader import read_as, seen_as_megatron
from checkpoint_tools.formats.huggingface_folder import (
    GENERATION_CONFIG_FILE,
    HF_CONFIG_FILE,
    TOKENIZER_FILES,
    copy_files,
)
from checkpoint_tools.formats.megatron_files import Entries, entry_facts, model_entries, write_weights
from checkpoint_tools.formats.opened_model import HF_FILES_FOLDER, OpenedModel, open_model
from checkpoint_tools.formats.safetensors_files import SafetensorsFolder
from checkpoint_tools.formats.tensor_reader import TensorFacts, TensorReader
from checkpoint_tools.formats.weight_map import weight_rules
from checkpoint_tools.tensor_listing import list_tensors
from data_prep.checksum_list import list_whole_folder
from data_prep.errors import UserError, run_cli
from data_prep.output_files import new_folder, write_json_whole
from data_prep.text_tokenizer import load_tokenizer
from pretrain.checkpoints.checkpoint_folder import (
    DESCRIPTION_FILE,
    FORMAT_VERSION,
    CheckpointDescription,
    LoopState,
    step_folder,
)
from pretrain.config import DataConfig, OptimizerConfig, RunConfig, StageName, TrainingConfig
from pretrain.cpu_redirects import prepare_conversion
from pretrain.recipes import recipe_fields

Precision = Literal["bf16", "fp32"]
PRECISIONS: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Import a Hugging Face folder of safetensors."""

    source: Path
    """The folder: config.json, *.safetensors, and the tokenizer's files."""
    output: Path
    """Run folder to write."""
    precision: Literal["keep", "bf16", "fp32"] = "keep"
    """Type of the stored weights, which must be the `training.precision` of the runs that use them."""
    pad_vocabulary_to_multiple_of: int = 1
    """Add rows to embedding and head until their number divides by this; needed where tensor-parallel ranks could not
    share them evenly. They never get probability, and the export leaves them out."""
    ignore_rope_scaling: bool = False
    """Leave out Llama 3.1's scaling of rotary frequencies, as the published CoLA weights may have been trained; keep
    what gives the lower IDM loss."""
    tokenizer: Path | None = None
    """Tokenizer folder; default: the source."""
    verify: bool = True
    """Check the source's file checksums where it has any, then compare every tensor and the outputs of both models."""
    overwrite: bool = False
    """Replace the output if it is an earlier import."""
    dry_run: bool = False
    """List all tensors, as they are and as they will be, and write nothing."""


def import_model(config: ImportConfig) -> None:
    """Write the run folder, complete or not at all.

    Raises:
        UserError: if the source is damaged, incomplete or of a kind that is not supported, or the output exists.
    """
    console = Console(highlight=False, soft_wrap=True)
    source = open_model(config.source)
    if not isinstance(source.source, SafetensorsFolder):
        raise UserError(
            f"{config.source}: is no Hugging Face folder but a checkpoint of ours; use it as it is"
        )
    model = source.model
    padding = -model.vocab_size % config.pad_vocabulary_to_multiple_of
    scaling = None if config.ignore_rope_scaling else model.rope_scaling_factor
    model = replace(model, vocab_padding=padding, rope_scaling_factor=scaling)
    recipe = _recipe(config, replace(source, model=model))
    entries = model_entries(recipe, source.parts)
    reader = _as_megatron(source.reader, recipe, entries, source.parts)
    for notice in source.notices:
        console.print(f"note: {notice}")
    if config.dry_run:
        list_tensors(
            console, source.reader.facts, reader.facts, weight_rules(model, source.actions, source.parts)
        )
        return
    tokenizer = load_tokenizer(config.tokenizer or config.source)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{config.tokenizer or config.source}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{model.vocab_size}; name the model's own with --tokenizer"
        )
    with new_folder(config.output, overwrite=config.overwrite, is_ours=_is_import) as folder:
        if config.verify:
            console.print(source.source.check_files().summary())
        checkpoint = step_folder(folder, 0)
        (checkpoint / "weights").mkdir(parents=True)
        fingerprints = write_weights(checkpoint / "weights", entries, reader, "import")
        description = _description(recipe, source.parts, tokenizer.fingerprint, fingerprints)
        write_json_whole(checkpoint / DESCRIPTION_FILE, asdict(description))
        _keep_files(config, checkpoint / HF_FILES_FOLDER)
        list_whole_folder(checkpoint)
        if config.verify:
            from checkpoint_tools.compare import verify_conversion  # loads two libraries of models

            console.print(verify_conversion(replace(source, model=model), open_model(checkpoint)))
    parameters = sum(e.numel for e in reader.facts.values())
    console.print(f"{config.output}: {parameters:,} parameters in {len(reader.facts)} tensors")


def _recipe(config: ImportConfig, source: OpenedModel) -> RunConfig:
    """The description's recipe: a run of no steps."""
    stage: StageName = "policy" if "policy" in source.parts else "idm" if "idm" in source.parts else "base"
    length = min(2048, source.model.max_position_embeddings)
    return RunConfig(
        stage=stage,
        run_folder=config.output,
        model=source.model,
        actions=source.actions,
        data=DataConfig(path=config.source, sequence_length=length),
        training=TrainingConfig(steps=0, precision=_precision(config, source.reader.facts)),
        optimizer=OptimizerConfig(decay_steps=0),
    )


def _precision(config: ImportConfig, facts: Mapping[str, TensorFacts]) -> Precision:
    if config.precision != "keep":
        return config.precision
    dtypes = {fact.dtype for fact in facts.values()}
    if len(dtypes) > 1 or not dtypes <= PRECISIONS.keys():
        found = ", ".join(sorted({fact.dtype_name for fact in facts.values()}))
        raise UserError(
            f"{config.source}: its tensors are {found}, runs are bf16 or fp32; choose with --precision "
            "(fp32 keeps every bit, bf16 rounds)"
        )
    return PRECISIONS[dtypes.pop()]


def _as_megatron(
    reader: TensorReader, recipe: RunConfig, entries: Entries, parts: tuple[str, ...]
) -> TensorReader:
    """`reader` as our model wants it; refuses another shape of any tensor."""
    dtype = next(dtype for dtype, name in PRECISIONS.items() if name == recipe.training.precision)
    converted = seen_as_megatron(read_as(reader, dtype), weight_rules(recipe.model, recipe.actions, parts))
    problems = [
        f"{name} is {list(converted.facts[name].shape)}, by the sizes in {HF_CONFIG_FILE} {list(facts.shape)}"
        for name, facts in entry_facts(entries).items()
        if converted.facts[name].shape != facts.shape
    ]
    if problems:
        raise UserError(f"{len(problems)} tensor(s) do not fit {HF_CONFIG_FILE}; first {problems[0]}")
    return converted


def _description(
    recipe: RunConfig, parts: tuple[str, ...], tokenizer_fingerprint: str, fingerprints: dict[str, str]
) -> CheckpointDescription:
    return CheckpointDescription(
        format_version=FORMAT_VERSION,
        stage=recipe.stage,
        step=0,
        consumed_samples=0,
        consumed_tokens=0,
        parts=list(parts),
        start_from=None,
        tokenizer_fingerprint=tokenizer_fingerprint,
        data_fingerprint="",
        recipe=recipe_fields(recipe),
        loop=LoopState(),
        fingerprints=fingerprints,
        megatron_version=version("megatron-core"),
    )


def _keep_files(config: ImportConfig, folder: Path) -> None:
    """The source's configuration and tokenizer, for the way back."""
    folder.mkdir()
    copy_files(config.source, folder, (HF_CONFIG_FILE, GENERATION_CONFIG_FILE))
    copy_files(config.tokenizer or config.source, folder, TOKENIZER_FILES)


def _is_import(folder: Path) -> bool:
    return (step_folder(folder, 0) / HF_FILES_FOLDER).is_dir()


def main() -> None:
    """Command line."""
    prepare_conversion()
    import_model(tyro.cli(ImportConfig, description=__doc__))


if __name__ == "__main__":
    run_cli(main)
