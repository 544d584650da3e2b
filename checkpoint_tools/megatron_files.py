"""Megatron distributed checkpoints, a tensor at a time: memory holds the largest tensor, not the model.

Megatron itself saves and loads whole models. The same files are read and written here through torch's own reader and
writer of that format, with a plan that asks for each tensor when its turn comes. Names are our model's parameter names
(`base.decoder.layers.0.mlp.linear_fc1.weight`), tensors are whole, whatever layout of ranks wrote them.
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from tqdm import tqdm

from checkpoint_tools.tensor_reader import TensorFacts, TensorReader
from data_prep.errors import UserError
from pretrain import cpu_redirects

cpu_redirects.apply()

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import get_default_save_common_strategy

from pretrain.checkpointing import DESCRIPTION_FILE, locate_parts, sharded_weights
from pretrain.config import ParallelConfig, RunConfig
from pretrain.fingerprint import fingerprint_tensors
from pretrain.model.cola import ColaModel
from pretrain.model.kernels import local_name
from pretrain.parallel import parallel_context

# A parameter as Megatron stores it: one tensor, or several made from it.
Entry = ShardedTensor | ShardedTensorFactory
Entries = dict[str, Entry]


def model_entries(recipe: RunConfig, parts: tuple[str, ...]) -> Entries:
    """How each parameter of `parts` is stored, by our names; from a model without data (meta device)."""
    # Without FP8, which is a matter of arithmetic and not of what is stored.
    in_precision = replace(recipe.training, fp8="off", base_fp8="off")
    on_one_rank = replace(recipe, parallel=ParallelConfig(), training=in_precision)
    with parallel_context(tensor_parallel_size=1, seed=recipe.seed) as context, torch.device("meta"):
        model = ColaModel(on_one_rank, context.groups, parts)
        return {local_name(name): entry for name, entry in sharded_weights(model, parts).items()}


def entry_facts(entries: Entries) -> dict[str, TensorFacts]:
    """Shape and type of each parameter."""
    return {name: TensorFacts(tuple(e.data.shape), e.data.dtype) for name, e in entries.items()}


class MegatronWeights:
    """A `TensorReader` of `parts` of a checkpoint and of those it started from.

    Raises:
        UserError: if a part is nowhere, or a tensor of it is missing or has another shape.
    """

    def __init__(self, recipe: RunConfig, checkpoint: Path, parts: tuple[str, ...]) -> None:
        self._entries = model_entries(recipe, parts)
        self._folders: dict[str, _WeightsFolder] = {}
        places = locate_parts(checkpoint)
        for part in parts:
            if part not in places:
                raise UserError(f"{checkpoint}: has no trained '{part}', nor has any run it started from")
            self._folders[part] = _WeightsFolder(places[part] / "weights")
        self.facts: Mapping[str, TensorFacts] = {
            name: self._folder(name).facts_of(entry) for name, entry in self._entries.items()
        }
        """Shapes of the model and types of the checkpoint."""

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor `name`, as it is stored.

        Raises:
            UserError: if the file is damaged.
        """
        facts = self.facts[name]
        tensor = torch.empty(facts.shape, dtype=facts.dtype)
        self._folder(name).read_into(_shards(_with_data(self._entries[name], tensor)))
        return tensor

    def fingerprint(self, name: str, tensor: torch.Tensor) -> dict[str, str]:
        """Fingerprints, by checkpoint key, of what `tensor` is stored as; those of cola.json if it is the one saved."""
        return fingerprint_tensors({name: _with_data(self._entries[name], tensor)})

    def _folder(self, name: str) -> "_WeightsFolder":
        return self._folders[name.split(".", 1)[0]]


def write_weights(folder: Path, entries: Entries, reader: TensorReader, label: str) -> dict[str, str]:
    """Write the weights/ `folder` of a checkpoint from `reader`, which has the names of `entries`.

    Args:
        folder: an existing empty folder.
        entries: of `model_entries`.
        reader: gives the tensors; of `entry_facts`' shapes, in the type that is to be stored.
        label: before the progress bar.

    Returns:
        Fingerprints of what was written, by checkpoint key.
    """
    total = sum(reader.facts[name].bytes for name in entries)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False) as progress:
        planner = _StreamingSavePlanner(entries, reader, progress)
        # One file, synchronised at the end, and no checksum of each tensor beside our fingerprint.
        writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
        checksums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            with warnings.catch_warnings():  # of torch, that one process is all there is
                warnings.simplefilter("ignore")
                dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        finally:
            torch.serialization.set_crc32_options(checksums)
    with parallel_context(tensor_parallel_size=1, seed=0):
        get_default_save_common_strategy().save_common({}, folder)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    return planner.fingerprints


@dataclass
class _Pending:
    """A shard that is still to be written."""

    name: str
    position: int


class _StreamingSavePlanner(SavePlanner):
    """Plans all shards by their shapes alone and reads the tensor of each when it is written."""

    def __init__(self, entries: Entries, reader: TensorReader, progress: "tqdm[None]") -> None:
        self.fingerprints: dict[str, str] = {}
        self._entries, self._reader, self._progress = entries, reader, progress
        self._pending: dict[MetadataIndex, _Pending] = {}
        self._shards: list[ShardedTensor] = []
        self._name = ""

    def set_up_planner(
        self,
        state_dict: dict[str, object],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Nothing comes from `state_dict`."""

    def create_local_plan(self) -> SavePlan:
        """One item for each shard, in the order of the names."""
        items: list[WriteItem] = []
        for name, entry in self._entries.items():
            dtype = self._reader.facts[name].dtype
            for position, shard in enumerate(_shards(entry)):
                chunk = _chunk(shard)
                index = MetadataIndex(shard.key, chunk.offsets)
                self._pending[index] = _Pending(name, position)
                data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(shard.global_shape))
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """torch's own, of one rank."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The shard of `write_item`."""
        pending = self._pending[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        if pending.name != self._name:
            self._free()
            self._read(pending.name)
        shard = self._shards[pending.position]
        self._progress.update(shard.data.nbytes)
        return shard.data.view(torch.Size(_chunk(shard).sizes))

    def _read(self, name: str) -> None:
        self._name, tensor = name, self._reader.read(name)
        facts = TensorFacts(tuple(tensor.shape), tensor.dtype)
        assert facts == self._reader.facts[name], f"{name}: {facts} is not {self._reader.facts[name]}"
        if facts.shape != tuple(self._entries[name].data.shape):
            raise UserError(
                f"{name}: has shape {facts.shape}, the model wants {tuple(self._entries[name].data.shape)}"
            )
        entry = _with_data(self._entries[name], tensor)
        self.fingerprints |= fingerprint_tensors({name: entry})
        self._shards = _shards(entry)

    def _free(self) -> None:
        """torch's writer holds every tensor until it closes its file; what is written is given back here."""
        for shard in self._shards:
            shard.data.untyped_storage().resize_(0)


class _WeightsFolder:
    """One weights/ folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except FileNotFoundError:
            raise UserError(f"{folder}: no Megatron checkpoint there (.metadata is missing)") from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def facts_of(self, entry: Entry) -> TensorFacts:
        """Shape of the parameter and type that it has here."""
        dtypes = set()
        for shard in _shards(entry):
            stored = self._metadata.state_dict_metadata.get(shard.key)
            if not isinstance(stored, TensorStorageMetadata):
                raise UserError(f"{self.folder}: has no tensor {shard.key}")
            if tuple(stored.size) != tuple(shard.global_shape):
                raise UserError(
                    f"{self.folder}: {shard.key} has shape {tuple(stored.size)}, the recipe in "
                    f"{DESCRIPTION_FILE} asks for {tuple(shard.global_shape)}"
                )
            dtypes.add(stored.properties.dtype)
        (dtype,) = dtypes
        return TensorFacts(tuple(entry.data.shape), dtype)

    def read_into(self, shards: list[ShardedTensor]) -> None:
        """Fill the data of `shards`, which may be views."""
        planner = _StreamingLoadPlanner(shards)
        items: list[ReadItem] = []
        for shard in shards:
            stored = self._metadata.state_dict_metadata[shard.key]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(shard.key, stored, [_chunk(shard)])
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except (OSError, EOFError, RuntimeError, ValueError) as error:
            words = " ".join(str(error).split())[:200]
            raise UserError(f"{self.folder}: {shards[0].key} cannot be read: {words}") from None


class _StreamingLoadPlanner(LoadPlanner):
    """Copies what is read into the given shards."""

    def __init__(self, shards: list[ShardedTensor]) -> None:
        self._targets = {(shard.key, _chunk(shard).offsets): shard for shard in shards}

    def set_up_planner(
        self, state_dict: dict[str, object], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing comes from `state_dict`."""

    def create_local_plan(self) -> LoadPlan:
        """The caller makes it."""
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """As it is."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: object) -> None:
        """No part of ours is stored as bytes."""
        raise NotImplementedError

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The place that `read_item` goes to."""
        offset = read_item.dest_index.offset
        assert offset is not None
        shard = self._targets[read_item.dest_index.fqn, offset]
        target = shard.data.view(torch.Size(_chunk(shard).sizes))
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It was copied in place."""


def _with_data(entry: Entry, data: torch.Tensor) -> Entry:
    """`entry` with real data, of its shape, in place of none."""
    if isinstance(entry, ShardedTensorFactory):
        return replace(entry, data=data)
    return replace(entry, data=data, dtype=data.dtype)


def _shards(entry: Entry) -> list[ShardedTensor]:
    """The tensors that a parameter is stored as; views of its data."""
    return list(_tensors(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]


def _tensors(built: object) -> Iterator[ShardedTensor]:
    if isinstance(built, ShardedTensor):
        yield built
    else:
        children = built.values() if isinstance(built, dict) else built
        for child in children:  # type: ignore[attr-defined]
            yield from _tensors(child)


def _chunk(shard: ShardedTensor) -> ChunkStorageMetadata:
    """Where in the stored tensor `shard` lies; layers that share a key are stacked along first axes of their own."""
    sizes = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return ChunkStorageMetadata(torch.Size(shard.global_offset), torch.Size(sizes))
