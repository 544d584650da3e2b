"""Pickles are read here and nowhere else, so that a checkpoint runs no code, whoever wrote it.

A pickle may have any function of any module called while it is read, and Megatron's checkpoints hold some:

    .metadata   which tensors there are, and where they lie
    common.pt   what is not sharded
    *.distcp    tensors, and between them objects: Transformer Engine's FP8 scales, the bytes of one more pickle

Tensors torch reads with an allow-list. The rest it and Megatron read as it comes; so it is read here first, by
allow-lists, and what names anything else is refused before any of it is called.
"""

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from data_prep.errors import UserError
from data_prep.folder_paths import inside_folder

METADATA_FILE, COMMON_FILE = ".metadata", "common.pt"

# Module and name in a pickle, and what is taken for them.
Names = Mapping[tuple[str, str], object]

_NAMES_OF_METADATA: Names = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        filesystem._StorageInfo,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        planner.BytesIOWriteData,
        planner.SavePlan,
        planner.TensorWriteData,
        planner.WriteItem,
        planner.WriteItemType,
        torch.Size,
        torch.serialization._get_layout,
        type(Path()),
    )
} | {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

_FOREIGN_GLOBAL = re.compile(r"GLOBAL (\S+)")  # in what torch says of it


def refuse_foreign_code(folder: Path) -> None:
    """For who has Megatron load the weights/ or optimizer/ `folder` to call first. Reads no tensors.

    Raises:
        UserError: a pickle in it names what no checkpoint needs, or is damaged.
    """
    described, common = read_metadata(folder), folder / COMMON_FILE
    if common.is_file():
        with _one_line(common), common.open("rb") as stream:
            _read_saved(stream, common)
    for place in _places_of_objects(described, folder / METADATA_FILE):
        file = folder / place.relative_path
        with _one_line(file), file.open("rb") as stream:
            stream.seek(place.offset)
            _check_objects(stream.read(place.length), file)


def read_metadata(folder: Path) -> Metadata:
    """What and where the tensors of the weights/ or optimizer/ `folder` are.

    Raises:
        UserError: there is no checkpoint, or its description names foreign code or other folders, or is damaged.
    """
    file = folder / METADATA_FILE
    if not file.is_file():
        raise UserError(f"{folder}: no Megatron checkpoint there ({METADATA_FILE} is missing)")
    with _one_line(file), file.open("rb") as stream:
        described = _Unpickler(stream, _NAMES_OF_METADATA, file).load()
        if not isinstance(described, Metadata):
            raise TypeError(f"a {type(described).__name__}")
        places = described.storage_data.values()
        for name in {place.relative_path for place in places}:
            inside_folder(name)
        for place in places:
            if place.offset < 0 or place.length < 0 or place.transform_descriptors:
                raise ValueError(f"{place} is no place in a file")
        return described


def _places_of_objects(described: Metadata, file: Path) -> list[filesystem._StorageInfo]:
    """Of all that is stored but tensors."""
    with _one_line(file):
        return [
            place
            for index, place in described.storage_data.items()
            if not isinstance(described.state_dict_metadata.get(index.fqn), TensorStorageMetadata)
        ]


class _Unpickler(pickle.Unpickler):
    """Knows a few names, and nothing but them."""

    def __init__(self, stream: BinaryIO, names: Names, file: Path) -> None:
        super().__init__(stream)
        self._names, self._file = names, file

    def find_class(self, module_name: str, global_name: str, /) -> object:
        try:
            return self._names[module_name, global_name]
        except KeyError:
            raise _foreign(self._file, f"{module_name}.{global_name}") from None


def _foreign(file: Path, name: str) -> UserError:
    return UserError(
        f"{file}: would have {name} called, which no checkpoint needs; none of it was run; do not use this checkpoint"
    )


@contextmanager
def _one_line(file: Path) -> Iterator[None]:
    """A damaged pickle can raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file}: cannot be read ({type(error).__name__}: {words}); use another checkpoint"
        ) from None


def _read_saved(stream: BinaryIO, file: Path) -> object:
    """What torch.save wrote, by torch's own allow-list."""
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := _FOREIGN_GLOBAL.search(str(error)):
            raise _foreign(file, found[1]) from None
        raise


def _check_objects(data: bytes, file: Path) -> None:
    """Of one entry: objects, of which a tensor is a pickle to Transformer Engine, unless it is empty."""
    objects = _read_saved(io.BytesIO(data), file)
    if not isinstance(objects, list):
        raise TypeError(f"a {type(objects).__name__}")
    for tensor in filter(torch.is_tensor, objects):
        if tensor.numel():
            _Unpickler(io.BytesIO(tensor.numpy().tobytes()), _NAMES_OF_SCALES, file).load()


class _StandIn:
    """For a class of Transformer Engine, which need not be there."""

    def __new__(cls, *_: object) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Keeps nothing."""


def _read_storage(data: bytes) -> object:
    """In place of torch's own function, which has no allow-list."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


_RECIPES = "transformer_engine.common.recipe"
_NAMES_OF_SCALES: Names = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _read_storage,
    (_RECIPES, "DelayedScaling"): _StandIn,
    (_RECIPES, "Format"): _StandIn,
    (_RECIPES, "_FormatHelper"): _StandIn,
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"): _StandIn,
}
