"""Megatron distributed checkpoints, a tensor at a time: memory holds the largest tensor, not the model.

Megatron itself saves and loads whole models. The same files, torch's distributed checkpoints, are read and written here
by torch's own parts, but a tensor at a time: its writer holds every tensor until its file is closed. Names are our
model's parameter names (`base.decoder.layers.0.mlp.linear_fc1.weight`), tensors are whole, whatever layout of ranks
wrote them.
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BufferedWriter
from pathlib import Path
from typing import TypeAlias

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view

from checkpoint_tools.formats.tensor_reader import TensorFacts, TensorReader, read_ahead
from data_prep.blending.flush import BackgroundFlush
from data_prep.errors import UserError
from data_prep.progress import progress_bar
from pretrain import cpu_redirects

cpu_redirects.apply()

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import get_default_save_common_strategy

from pretrain.checkpoints.checkpoint_folder import DESCRIPTION_FILE, locate_parts
from pretrain.checkpoints.checkpointing import check_fingerprints, sharded_weights
from pretrain.checkpoints.safe_pickle import read_metadata
from pretrain.config import ParallelConfig, RunConfig
from pretrain.fingerprint import fingerprint_tensors
from pretrain.model.cola import ColaModel
from pretrain.model.kernels import local_name
from pretrain.parallel import parallel_context

# A parameter as Megatron stores it: one tensor, or several made from it.
Entry: TypeAlias = ShardedTensor | ShardedTensorFactory
Entries: TypeAlias = dict[str, Entry]
DATA_FILE = "__0_0.distcp"  # as the trainer's own, of a single rank


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
        places = locate_parts(checkpoint, parts)
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
        return self._folder(name).read(self._entries[name], self.facts[name])

    def fingerprint(self, name: str, tensor: torch.Tensor) -> dict[str, str]:
        """Fingerprints, by checkpoint key, of what `tensor` is stored as; those of cola.json if it is the one saved."""
        return fingerprint_tensors({name: _with_data(self._entries[name], tensor)})

    def _folder(self, name: str) -> "_WeightsFolder":
        return self._folders[name.split(".", 1)[0]]


class CheckedWeights:
    """A `TensorReader` of the same tensors, each held against the fingerprint that the checkpoint recorded of it."""

    def __init__(self, weights: MegatronWeights, recorded: Mapping[str, str], checkpoint: Path) -> None:
        self._weights, self._recorded, self._checkpoint = weights, dict(recorded), checkpoint
        self.facts: Mapping[str, TensorFacts] = weights.facts

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor `name`.

        Raises:
            UserError: if it is not what was saved.
        """
        tensor = self._weights.read(name)
        check_fingerprints(self._recorded, self._weights.fingerprint(name, tensor), str(self._checkpoint))
        return tensor


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
    fingerprinted, results = _FingerprintingReader(entries, reader), list[WriteResult]()
    # No checksum of each tensor beside our fingerprint.
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with (
            progress_bar(label, total, unit="B", unit_scale=True, leave=False) as progress,
            (folder / DATA_FILE).open("wb") as stream,
            BackgroundFlush(folder / DATA_FILE) as flush,
        ):
            for name, tensor in read_ahead(fingerprinted, entries):
                results += _write_tensor(stream, _with_data(entries[name], tensor))
                del tensor  # before the next one is waited for
                progress.update(reader.facts[name].bytes)
                flush.start()
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        torch.serialization.set_crc32_options(checksums)
    _write_metadata(folder, entries, reader, results)
    return fingerprinted.fingerprints


class _FingerprintingReader:
    """`reader`, which also takes the fingerprints of what it reads; in the thread that reads ahead."""

    def __init__(self, entries: Entries, reader: TensorReader) -> None:
        self._entries, self._reader = entries, reader
        self.facts, self.fingerprints = reader.facts, dict[str, str]()

    def read(self, name: str) -> torch.Tensor:
        tensor = self._reader.read(name)
        self.fingerprints |= fingerprint_tensors({name: _with_data(self._entries[name], tensor)})
        return tensor


def _write_tensor(stream: BufferedWriter, entry: Entry) -> list[WriteResult]:
    """Append the shards of one tensor; returns their places."""
    results = []
    for shard in _shards(entry):
        chunk, offset = _chunk(shard), stream.tell()
        _save(_with_own_storage(shard.data).view(chunk.sizes), stream)
        size = stream.tell() - offset
        place = _StorageInfo(DATA_FILE, offset, size)
        results.append(WriteResult(MetadataIndex(shard.key, chunk.offsets), size, place))
    return results


def _save(tensor: torch.Tensor, stream: BufferedWriter) -> None:
    try:
        torch.save(tensor, stream)
    except RuntimeError as error:
        # Of a full disk torch says that a position is wrong.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _with_own_storage(data: torch.Tensor) -> torch.Tensor:
    """The same memory, as a tensor that is no view: of a view torch saves all that it is a part of."""
    if not data.numel():
        return data.clone()
    memory = data.contiguous().view(-1).view(torch.uint8).numpy().data
    return torch.frombuffer(memory, dtype=torch.uint8).view(data.dtype).view(data.shape)


def _write_metadata(folder: Path, entries: Entries, reader: TensorReader, results: list[WriteResult]) -> None:
    """What Megatron and torch look up before they read."""
    items: list[WriteItem] = []
    for name, entry in entries.items():
        properties = TensorProperties(dtype=reader.facts[name].dtype)
        for shard in _shards(entry):
            chunk = _chunk(shard)
            data = TensorWriteData(chunk, properties, torch.Size(shard.global_shape))
            index = MetadataIndex(shard.key, chunk.offsets)
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
    _, metadata = create_default_global_save_plan([SavePlan(items)])
    FileSystemWriter(folder).finish(metadata, [results])
    with parallel_context(tensor_parallel_size=1, seed=0):
        get_default_save_common_strategy().save_common({}, folder)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _WeightsFolder:
    """One weights/ folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder)

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

    def read(self, entry: Entry, facts: TensorFacts) -> torch.Tensor:
        """The parameter, put together from what is stored of it.

        Raises:
            UserError: if the file is damaged.
        """
        try:
            return self._read(entry, facts)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            words = " ".join(str(error).split())[:200]
            raise UserError(f"{self.folder}: {_shards(entry)[0].key} cannot be read: {words}") from None

    def _read(self, entry: Entry, facts: TensorFacts) -> torch.Tensor:
        tensor: torch.Tensor | None = None
        for position, shard in enumerate(_shards(entry)):
            for item in self._stored_pieces(shard):
                piece = self._read_piece(item)
                if piece.numel() == facts.numel:  # all of it; no copy
                    return piece.view(facts.shape)
                if tensor is None:
                    tensor = torch.empty(facts.shape, dtype=facts.dtype)
                target = _shards(_with_data(entry, tensor))[position].data.view(_chunk(shard).sizes)
                narrow_tensor_by_index(target, item.dest_offsets, item.lengths).copy_(piece)
        assert tensor is not None, "every parameter has a shard"
        return tensor

    def _stored_pieces(self, shard: ShardedTensor) -> list[ReadItem]:
        """Where what is stored of `shard` lies, and where in it each piece goes."""
        stored = self._metadata.state_dict_metadata[shard.key]
        assert isinstance(stored, TensorStorageMetadata), "facts_of has seen it"
        return create_read_items_for_chunk_list(shard.key, stored, [_chunk(shard)])

    def _read_piece(self, item: ReadItem) -> torch.Tensor:
        place = self._metadata.storage_data[item.storage_index]
        with (self.folder / place.relative_path).open("rb") as stream:
            view = _create_file_view(stream, place.offset, place.length)
            stored = torch.load(view, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        return narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)


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
