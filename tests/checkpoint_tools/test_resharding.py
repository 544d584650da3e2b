"""A checkpoint is the same on every layout of ranks, and one written a tensor at a time is as good as the trainer's.

The other half of this file is a program that the tests start once: four forked ranks load what was streamed on every
layout of two by two, and save on the largest.
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data_prep.errors import UserError
from pretrain import cpu_redirects

cpu_redirects.apply()

from checkpoint_tools.formats.megatron_files import MegatronWeights, model_entries, write_weights
from pretrain.checkpoints import checkpoint_folder, checkpointing
from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel
from pretrain.optimization import build_optimizer, make_loadable, wrap_for_data_parallel
from pretrain.parallel import ParallelContext, parallel_context
from tests.forked_ranks import run_ranks, start_program
from tests.pretrain.tiny_runs import UNLIKE_SIZES, save_now, tiny_recipe

STEP = 7
PARTS = ("base", "idm", "world_model", "policy")
SAVED = (2, 2)
LAYOUTS = ((1, 1), (2, 1), (1, 2), SAVED)
"""Tensor- and pipeline-parallel sizes; data parallelism makes up for the rest of the four ranks."""


class Stored(NamedTuple):
    """What `.metadata` says of a tensor: its whole shape, its type, and the offsets and sizes of its chunks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]


def recipe_of(run: Path, tensor: int = 1, pipeline: int = 1) -> RunConfig:
    """A run whose checkpoints hold all parts, with biases, in BF16, every size another number."""
    return tiny_recipe(
        "policy",
        run,
        run / "no data is read",
        run / "nothing is started from",
        model={**UNLIKE_SIZES, "num_layers": 4, "qkv_bias": True},
        actions={"num_actions": 12, "num_idm_layers": 3, "num_policy_layers": 2},
        training={"precision": "bf16"},
        parallel={"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline},
        checkpoint={"self_contained": True},
    )


def save(config: RunConfig, context: ParallelContext, weights: Path | None) -> None:
    """The trainer's own checkpoint, of the weights of another one or else of random numbers. Collective."""
    model = ColaModel(config, context.groups, PARTS)
    model.freeze_all_but(("policy",))
    if weights is not None:
        checkpointing.load_checked(model, PARTS, weights)
    else:
        randomise(model)
    optimizer = build_optimizer(config, wrap_for_data_parallel(model, context))
    make_loadable(optimizer)  # gives it a state without a step
    save_now(
        config,
        context,
        step=STEP,
        model=model,
        optimizer=optimizer,
        trained_parts=("policy",),
        fingerprints=checkpointing.model_fingerprints(model, PARTS),
    )


def randomise(model: ColaModel) -> None:
    """Other numbers in every tensor, also in norms and biases, which would start alike."""
    generator = torch.Generator().manual_seed(STEP)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(generator=generator)


def stream(source: Path, target: Path) -> None:
    """Write a checkpoint once more, a tensor at a time."""
    (target / "weights").mkdir(parents=True)
    recipe = recipe_of(source)
    reader = MegatronWeights(recipe, source, PARTS)
    written = write_weights(target / "weights", model_entries(recipe, PARTS), reader, "copy")
    described = replace(checkpoint_folder.read_description(source), fingerprints=written)
    (target / checkpoint_folder.DESCRIPTION_FILE).write_text(json.dumps(asdict(described)))


def flip_a_bit(checkpoint: Path, name: str) -> None:
    """Change one bit of the tensor `name` in the checkpoint's files."""
    data = weights_of(checkpoint).read(name).view(torch.uint8).numpy().tobytes()
    for file in (checkpoint / "weights").glob("*.distcp"):
        content = bytearray(file.read_bytes())
        if (place := content.find(data)) >= 0:
            content[place + len(data) // 2] ^= 1
            file.write_bytes(content)
            return
    raise AssertionError(f"{name} is not stored in one piece")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one model, and a report of loading by layout.

    Runs one_rank/ and, by the launch, four_ranks/ of the trainer; checkpoints streamed/ and damaged/.
    """
    folder = tmp_path_factory.mktemp("resharding")
    with parallel_context(tensor_parallel_size=1, seed=0) as context:
        save(recipe_of(folder / "one_rank"), context, weights=None)
    stream(checkpoint_of(folder, "one_rank"), folder / "streamed")
    shutil.copytree(folder / "streamed", folder / "damaged")
    flip_a_bit(folder / "damaged", "policy.head.weight")
    start_program("tests.checkpoint_tools.test_resharding", folder)
    return folder


def checkpoint_of(folder: Path, run: str) -> Path:
    """Where the trainer has put its checkpoint."""
    return checkpoint_folder.step_folder(folder / run, STEP)


def weights_of(checkpoint: Path) -> MegatronWeights:
    """All parts, on one process."""
    return MegatronWeights(recipe_of(checkpoint), checkpoint, PARTS)


def different_tensors(expected: Path, found: Path) -> list[str]:
    """Names of those that are not the same bytes of the same shape and type."""
    ours, theirs = weights_of(expected), weights_of(found)
    assert list(ours.facts) == list(theirs.facts)
    return [
        name
        for name, facts in ours.facts.items()
        if facts != theirs.facts[name]
        or not torch.equal(ours.read(name).view(torch.uint8), theirs.read(name).view(torch.uint8))
    ]


@pytest.mark.distributed
def test_four_ranks_write_what_one_rank_writes(folder: Path) -> None:
    """Read on one process, a checkpoint of TP 2 x PP 2 is byte for byte that of one rank, in every part."""
    sharded = checkpoint_of(folder, "four_ranks")
    assert len(list((sharded / "weights").glob("*.distcp"))) >= 4
    assert {name.split(".")[0] for name in weights_of(sharded).facts} == set(PARTS)
    assert different_tensors(checkpoint_of(folder, "one_rank"), sharded) == []


@pytest.mark.distributed
def test_a_bit_of_one_rank_shows(folder: Path, tmp_path: Path) -> None:
    """The fault twin: one bit in the file of one of the four ranks is one tensor that differs."""
    faulty = tmp_path / "faulty"
    shutil.copytree(checkpoint_of(folder, "four_ranks"), faulty)
    flip_a_bit(faulty, "base.decoder.final_layernorm.weight")
    changed = different_tensors(checkpoint_of(folder, "one_rank"), faulty)
    assert changed == ["base.decoder.final_layernorm.weight"]


@pytest.mark.distributed
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_every_layout_loads_what_was_streamed(folder: Path, tensor: int, pipeline: int) -> None:
    """All parts, held against the recorded fingerprints by the trainer itself; the twin is one bit off."""
    report = json.loads((folder / f"tp{tensor}_pp{pipeline}.json").read_text())
    trainers = checkpoint_folder.read_description(checkpoint_of(folder, "one_rank"))
    assert report["streamed"] == trainers.fingerprints
    assert "1 tensor(s) are not what was saved, first policy.head.weight" in report["damaged"]


def stored_tensors(checkpoint: Path) -> dict[str, Stored]:
    """What `.metadata` says of the weights."""
    entries = FileSystemReader(checkpoint / "weights").read_metadata().state_dict_metadata
    return {key: stored_tensor(entry) for key, entry in entries.items()}


def stored_tensor(entry: object) -> Stored:
    assert isinstance(entry, TensorStorageMetadata), entry
    chunks = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
    return Stored(tuple(entry.size), entry.properties.dtype, chunks)


@pytest.mark.distributed
def test_streamed_files_are_described_like_the_trainers(folder: Path) -> None:
    """Same keys, shapes, types and chunks as one rank's save; the chunks of four ranks, the twin, are others."""
    trainers = stored_tensors(checkpoint_of(folder, "one_rank"))
    sharded = stored_tensors(checkpoint_of(folder, "four_ranks"))
    assert stored_tensors(folder / "streamed") == trainers
    assert sharded != trainers
    assert {key: stored[:2] for key, stored in sharded.items()} == {
        key: stored[:2] for key, stored in trainers.items()
    }


def load_report(config: RunConfig, context: ParallelContext, checkpoint: Path) -> dict[str, str] | str:
    """The fingerprints of all parts of `checkpoint` as loaded on this layout, or what the trainer said. Collective."""
    model = ColaModel(config, context.groups, PARTS)
    try:
        return checkpointing.load_checked(model, PARTS, checkpoint)
    except UserError as error:
        return str(error)


def run_rank(folder: Path) -> None:
    """One of the four ranks, through all layouts."""
    for tensor, pipeline in LAYOUTS:
        with parallel_context(tensor, seed=0, pipeline_parallel_size=pipeline) as context:
            config = recipe_of(folder / "four_ranks", tensor, pipeline)
            report = {name: load_report(config, context, folder / name) for name in ("streamed", "damaged")}
            if context.is_first_rank:
                (folder / f"tp{tensor}_pp{pipeline}.json").write_text(json.dumps(report))
            if (tensor, pipeline) == SAVED:
                save(config, context, checkpoint_of(folder, "one_rank"))


def main() -> None:
    """The program that the tests start."""
    folder = Path(sys.argv[1])
    run_ranks(4, folder / "rendezvous", run_rank, folder)
