"""Export a run as a Hugging Face folder that anyone can load.

    python checkpoint_tools/megatron_to_hf.py --run runs/demo/policy --output runs/demo/hf

A base run becomes a plain Llama, Qwen2.5 or Mistral folder; a run of stage idm or policy a CoLA folder with its own
code (`trust_remote_code=True`). The frozen parts are gathered from the runs it started from, every tensor is checked
against its recorded fingerprint, and tensors pass through one at a time: memory holds the largest, not the model.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

from checkpoint_tools.formats.huggingface_folder import HF_CONFIG_FILE, ExportFacts, write_folder
from checkpoint_tools.formats.model_card import model_card
from checkpoint_tools.formats.opened_model import HF_FILES_FOLDER, OpenedCheckpoint, OpenedModel, open_model
from checkpoint_tools.formats.safetensors_files import write_safetensors
from checkpoint_tools.formats.weight_map import weight_rules
from checkpoint_tools.tensor_listing import list_tensors
from data_prep.checksum_list import CHECKSUM_LIST
from data_prep.errors import UserError, run_cli
from data_prep.output_files import new_folder
from data_prep.text_tokenizer import load_tokenizer
from pretrain.checkpoints.checkpoint_folder import locate_parts
from pretrain.cpu_redirects import prepare_conversion

MODEL_CARD_FILE = "README.md"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a run to a Hugging Face folder."""

    run: Path
    """Run folder (its newest checkpoint is taken) or one of its checkpoints/step_* folders."""
    output: Path
    """Folder to write."""
    layout: Literal["cola", "lamda-rl"] = "cola"
    """cola: our own model code beside the weights; lamda-rl: names and config.json of the published CoLA weights, for
    the authors' code."""
    without: tuple[Literal["idm", "policy"], ...] = ()
    """Parts to leave out: generation needs no idm; a folder without policy plays given actions only."""
    dtype: Literal["keep", "bf16", "fp32"] = "keep"
    """Type of the written weights."""
    shard_gib: float = 4.5
    """Most data in one file, GiB."""
    tokenizer: Path | None = None
    """Tokenizer folder; default: the one that was imported with the base, else that of the training data."""
    verify: bool = True
    """Afterwards compare every tensor, and the outputs of both models, with the run."""
    overwrite: bool = False
    """Replace the output if it is an earlier export."""
    dry_run: bool = False
    """List all tensors, as they are and as they will be, and write nothing."""


def export(config: ExportConfig) -> None:
    """Write the folder, complete or not at all.

    Raises:
        UserError: if the run cannot be exported so, files are damaged, or the output exists.
    """
    console = Console(highlight=False, soft_wrap=True)
    opened = open_model(config.run)
    if not isinstance(opened.source, OpenedCheckpoint):
        raise UserError(
            f"{config.run}: is a Hugging Face folder already; import it first to export another form of it"
        )
    checkpoint = opened.source
    chosen = replace(opened, parts=_chosen_parts(config, opened))
    rules = weight_rules(opened.model, opened.actions, chosen.parts)
    names = [name for rule in rules for name in rule.huggingface]
    if config.dry_run:
        list_tensors(console, opened.reader.facts, checkpoint.weights.facts, rules)
        return
    imported = _imported_files(checkpoint.folder)
    tokenizer_folder = config.tokenizer or imported or checkpoint.recipe.data.path / "tokenizer"
    facts = ExportFacts(
        model=opened.model,
        actions=opened.actions,
        parts=chosen.parts,
        dtype=DTYPES.get(config.dtype, opened.reader.facts[names[0]].dtype),
        eos_id=_checked_eos(tokenizer_folder, checkpoint.description.tokenizer_fingerprint),
        base_files=imported,
    )
    with new_folder(config.output, overwrite=config.overwrite, is_ours=_is_export) as folder:
        write_folder(folder, facts, config.layout, tokenizer_folder)
        shard_bytes = int(config.shard_gib * 2**30)
        write_safetensors(folder, opened.reader, names, shard_bytes, dtype=DTYPES.get(config.dtype))
        (folder / MODEL_CARD_FILE).write_text(model_card(checkpoint, chosen.parts, config.layout))
        if config.verify:
            from checkpoint_tools.compare import verify_conversion  # loads two libraries of models

            console.print(verify_conversion(chosen, open_model(folder)))
    parameters = sum(opened.reader.facts[name].numel for name in names)
    console.print(f"{config.output}: {parameters:,} parameters in {len(names)} tensors")


def _chosen_parts(config: ExportConfig, opened: OpenedModel) -> tuple[str, ...]:
    if opened.parts == ("base",) and config.layout != "cola":
        raise UserError(f"{opened.path}: is a base alone, which has one layout; leave --layout out")
    absent = [part for part in config.without if part not in opened.parts]
    if absent:
        raise UserError(f"{opened.path}: has no {absent[0]} to leave out; drop --without {absent[0]}")
    return tuple(part for part in opened.parts if part not in config.without)


def _imported_files(checkpoint: Path) -> Path | None:
    """What was kept of the Hugging Face folder that the base came from, if it came from one."""
    kept = locate_parts(checkpoint, ("base",))["base"] / HF_FILES_FOLDER
    return kept if kept.is_dir() else None


def _checked_eos(folder: Path, fingerprint: str) -> int:
    """The end-of-document token of the tokenizer in `folder`, which must be the one that the run was trained with."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no tokenizer there; name its folder with --tokenizer")
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{folder} is not the tokenizer of this run's data; name the right one with --tokenizer"
        )
    return tokenizer.eos_id


def _is_export(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (HF_CONFIG_FILE, CHECKSUM_LIST, MODEL_CARD_FILE))


def main() -> None:
    """Command line."""
    prepare_conversion()
    export(tyro.cli(ExportConfig, description=__doc__))


if __name__ == "__main__":
    run_cli(main)
