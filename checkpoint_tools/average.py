"""Average the weights of several checkpoints into one.

    python checkpoint_tools/average.py runs/demo/idm --last 3 --output runs/demo/idm_mean
    python checkpoint_tools/average.py RUN/checkpoints/step_00004000 RUN/checkpoints/step_00005000 --output FOLDER

Each element of a trained tensor becomes the arithmetic mean of that element in all checkpoints, computed in twice the
precision (fp32 for BF16, fp64 for fp32) and rounded to the checkpoints' type; frozen tensors stay as they are. What is
written is a run folder with one checkpoint, which serves as `start_from` or `init_from` of a run and for export,
evaluation and all else that reads checkpoints. It has no optimizer state, so training cannot be resumed in it.

Every tensor read is held against its recorded fingerprint. Memory: the sum and the one tensor that is read, which is
about five times the largest trained tensor, however many checkpoints there are.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from checkpoint_tools.formats.megatron_files import (
    CheckedWeights,
    MegatronWeights,
    model_entries,
    write_weights,
)
from checkpoint_tools.formats.tensor_reader import TensorFacts, TensorReader
from data_prep.errors import UserError, run_cli
from data_prep.output_files import new_folder, write_json_whole
from pretrain.checkpoints.checkpoint_folder import (
    DESCRIPTION_FILE,
    CheckpointDescription,
    find_checkpoints,
    read_description,
    resolve_checkpoint,
    start_of,
    step_folder,
)
from pretrain.config import RunConfig
from pretrain.cpu_redirects import prepare_conversion
from pretrain.fingerprint import differing_tensors
from pretrain.planning.parameters import trained_parts
from pretrain.recipes import recipe_from_fields
from pretrain.run_checks import flat_fields

# In the written folder: which checkpoints it is the mean of.
SOURCES_FILE = "average.json"
# What decides with which weights a run begins and what they mean; means across it are of no use.
SHARED_FIELDS = ("stage", "seed", "init_from", "model.", "actions.", "training.precision")
# Equal tensors sum up without rounding in these, so that they are their own mean.
_SUM_TYPE = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
_CHUNK_ELEMENTS = 1 << 20  # cast at once; torch alone would cast the whole tensor


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Average checkpoints of one run, or of runs that began alike."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """A run folder, together with --last; or two or more checkpoints/step_* folders."""
    last: Annotated[int | None, tyro.conf.arg(metavar="K")] = None
    """Take the newest K checkpoints of the run."""
    output: Path
    """Run folder to write."""
    overwrite: bool = False
    """Replace the output if it is an earlier average."""


@dataclass(frozen=True)
class Source:
    """One of the checkpoints to be averaged."""

    folder: Path
    """checkpoints/step_*"""
    description: CheckpointDescription
    """Its cola.json."""
    recipe: RunConfig
    """The run that wrote it."""

    def weights(self, parts: tuple[str, ...]) -> CheckedWeights:
        """Its tensors of `parts`."""
        weights = MegatronWeights(self.recipe, self.folder, parts)
        return CheckedWeights(weights, self.description.fingerprints, self.folder)


def average(config: AverageConfig) -> None:
    """Write the run folder, complete or not at all.

    Raises:
        UserError: if the checkpoints are fewer than two, do not belong together or are damaged, or the output exists.
    """
    sources = [_open(folder) for folder in _choose(config)]
    _refuse_unlike(sources)
    newest = max(sources, key=lambda source: source.description.step)
    parts = tuple(newest.description.parts)
    trained = trained_parts(newest.recipe)
    start = start_of(newest.folder, newest.description)
    reader = MeanOfReaders([source.weights(trained) for source in sources], newest.weights(parts))
    with new_folder(config.output, overwrite=config.overwrite, is_ours=_is_average) as folder:
        checkpoint = step_folder(folder, newest.description.step)
        (checkpoint / "weights").mkdir(parents=True)
        entries = model_entries(newest.recipe, parts)
        written = write_weights(checkpoint / "weights", entries, reader, "average")
        description = replace(
            newest.description,
            fingerprints=newest.description.fingerprints | written,
            start_from=_seen_from(config.output, start) if start else None,
        )
        write_json_whole(checkpoint / DESCRIPTION_FILE, asdict(description))
        mean_of = [_seen_from(config.output, source.folder) for source in sources]
        write_json_whole(folder / SOURCES_FILE, {"mean_of": mean_of})
    steps = ", ".join(f"{source.description.step:,}" for source in sources)
    print(f"{config.output}: {', '.join(trained)} are the means of {len(sources)} checkpoints, steps {steps}")


class MeanOfReaders:
    """A `TensorReader` of all tensors of `rest`; those that `readers` have are the means of theirs."""

    def __init__(self, readers: Sequence[TensorReader], rest: TensorReader) -> None:
        self._readers, self._rest = readers, rest
        self.facts: Mapping[str, TensorFacts] = rest.facts

    def read(self, name: str) -> torch.Tensor:
        """The mean of `name`, in its own type; equal tensors have themselves as mean, bit for bit."""
        if name not in self._readers[0].facts:
            return self._rest.read(name)
        dtype = self.facts[name].dtype
        total = self._readers[0].read(name).to(_SUM_TYPE[dtype])
        for reader in self._readers[1:]:
            _add(total, reader.read(name))
        return total.div_(len(self._readers)).to(dtype)


def _add(total: torch.Tensor, tensor: torch.Tensor) -> None:
    """Add `tensor` to `total`, of another type, without a whole copy; nothing holds on to it afterwards."""
    chunks = (t.view(-1).split(_CHUNK_ELEMENTS) for t in (total, tensor))
    for sums, addends in zip(*chunks, strict=True):
        sums += addends


def _choose(config: AverageConfig) -> list[Path]:
    """The checkpoints meant, each once."""
    if config.last is None:
        folders = [resolve_checkpoint(path).resolve() for path in config.checkpoints]
        if len(folders) < 2:
            raise UserError(
                f"{len(folders)} checkpoint(s) named; a mean needs two or more, or a run folder and --last K"
            )
        if twice := [folder for folder in folders if folders.count(folder) > 1]:
            raise UserError(f"{twice[0]}: is named twice; name each checkpoint once")
        return folders
    if len(config.checkpoints) != 1:
        raise UserError(f"--last {config.last} goes with one run folder, not with {len(config.checkpoints)}")
    (run,) = config.checkpoints
    folders = find_checkpoints(run)
    if config.last < 2:
        raise UserError(f"--last {config.last}: a mean needs two checkpoints or more")
    if len(folders) < config.last:
        raise UserError(
            f"{run}: holds {len(folders)} complete checkpoint(s), fewer than --last {config.last}; a run keeps as "
            "many as its checkpoint.keep_last says"
        )
    return folders[-config.last :]


def _open(folder: Path) -> Source:
    description = read_description(folder)
    return Source(folder, description, recipe_from_fields(description.recipe, str(folder)))


def _refuse_unlike(sources: Sequence[Source]) -> None:
    """Raise unless all have the same stage and sizes, began alike, and stand on the same frozen tensors."""
    first = sources[0]
    for source in sources[1:]:
        ours, theirs = _shared_fields(first), _shared_fields(source)
        if unlike := [name for name in ours if ours[name] != theirs[name]]:
            differences = "; ".join(f"{name}: {ours[name]} and {theirs[name]}" for name in unlike)
            raise UserError(
                f"{source.folder}: is of another run than {first.folder} ({differences}); "
                "average checkpoints of one run, or of runs that differ in nothing of this"
            )
        if changed := differing_tensors(_frozen_fingerprints(first), _frozen_fingerprints(source)):
            raise UserError(
                f"{source.folder}: stands on other frozen tensors than {first.folder} ({len(changed)} differ, first "
                f"{changed[0]}); average checkpoints that started from the same one"
            )


def _shared_fields(source: Source) -> dict[str, str]:
    fields = {k: v for k, v in flat_fields(source.recipe).items() if k.startswith(SHARED_FIELDS)}
    return fields | {"tokenizer_fingerprint": source.description.tokenizer_fingerprint}


def _frozen_fingerprints(source: Source) -> dict[str, str]:
    trained = trained_parts(source.recipe)
    return {k: v for k, v in source.description.fingerprints.items() if k.split(".")[0] not in trained}


def _seen_from(output: Path, folder: Path) -> str:
    """`folder` relative to the run folder `output`, which need not be there yet."""
    return os.path.relpath(folder.resolve(), output.parent.resolve() / output.name)


def _is_average(folder: Path) -> bool:
    return (folder / SOURCES_FILE).is_file()


def main() -> None:
    """Command line."""
    prepare_conversion()
    average(tyro.cli(AverageConfig, description=__doc__))


if __name__ == "__main__":
    run_cli(main)
