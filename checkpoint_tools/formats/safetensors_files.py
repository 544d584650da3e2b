"""Folders of safetensors, as Hugging Face models are published: read and written one tensor at a time.

    source = open_safetensors(Path("Llama-3.1-8B"))
    source.check_files()
    write_safetensors(Path("copy"), source, list(source.facts), shard_bytes=5 * 10**9)

Not by the library, because that keeps memory to one tensor: the library's reader maps whole files, and its writer
wants all tensors of a file at once.

Writes the shards, their index where there are several, and their checksums.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint_tools.formats.file_checksums import (
    DIGESTS,
    file_sum,
    recorded_sums,
    refuse_other_folders,
)
from checkpoint_tools.formats.safetensors_header import TensorPlace, damaged_file, header_of, read_header
from checkpoint_tools.formats.tensor_reader import TensorFacts, TensorReader, read_ahead
from data_prep.blending.flush import BackgroundFlush
from data_prep.checksum_list import CHECKSUM_LIST, write_checksum_list
from data_prep.errors import IntegrityError, UserError
from data_prep.output_files import read_json_object, write_json_whole
from data_prep.progress import progress_bar

INDEX_NAME = "model.safetensors.index.json"
PYTORCH_FORMAT: Mapping[str, str] = {"format": "pt"}  # transformers refuses files that do not say so
BLOCK_BYTES = 1 << 22  # cast, hashed and written together, while in the processor's cache

SHARD_NAME = re.compile(r"(?P<family>.+?)(-\d{5}-of-(?P<total>\d{5}))?\.safetensors")
PICKLES = (".bin", ".pth", ".pt", ".ckpt")


@dataclass(frozen=True)
class CheckedFiles:
    """What `SafetensorsFolder.check_files` has compared with a checksum."""

    files: tuple[str, ...]
    """Files that are, byte by byte, what their checksums say."""
    unchecked_shards: tuple[str, ...]
    """Shards of the model for which there is no checksum."""

    def summary(self) -> str:
        """One line."""
        checked = f"files that match their checksums: {len(self.files)}"
        unchecked = f"shards without one to match: {len(self.unchecked_shards)}"
        return f"{checked}; {unchecked}" if self.unchecked_shards else checked


class SafetensorsFolder:
    """A TensorReader over the shards of a folder; tensors in the order of shards and of their data."""

    def __init__(self, folder: Path, places: dict[str, TensorPlace], notices: list[str]) -> None:
        self.folder = folder
        self.notices = notices  # what the user should know of the folder, a line each
        self.facts: Mapping[str, TensorFacts] = {name: place.facts for name, place in places.items()}
        self._places = places

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, contiguous, on the CPU, the caller's own.

        Raises:
            KeyError: there is none.
            UserError: the shard became shorter since it was opened.
        """
        place = self._places[name]
        data = torch.empty(place.facts.bytes, dtype=torch.uint8)
        with place.path.open("rb") as stream:
            stream.seek(place.offset)
            if stream.readinto(data.numpy().data) != place.facts.bytes:
                raise damaged_file(place.path, f"ends within {name}")
        return data.view(place.facts.dtype).reshape(place.facts.shape)

    def check_files(self, *, progress: bool = True) -> CheckedFiles:
        """Compare files with the checksums that are recorded of them (`file_checksums`); reads them whole.

        Args:
            progress: show a bar.

        Raises:
            UserError: a list of checksums cannot be used, or names a file that is not there.
            IntegrityError: a file is not what its checksum says.
        """
        shards = list(dict.fromkeys(place.path for place in self._places.values()))
        expected = recorded_sums(self.folder, shards)
        missing = [path for path in expected if not path.is_file()]
        if missing:
            raise UserError(
                f"{missing[0]}: is named in {expected[missing[0]][0]} but is missing; download it again"
            )
        total_bytes = sum(path.stat().st_size for path in expected)
        with progress_bar("check", total_bytes, unit="B", unit_scale=True, shown=progress) as bar:
            for path, (kind, checksum) in expected.items():
                if file_sum(path, kind, bar.update) != checksum:
                    raise IntegrityError(f"{path}: is not what its checksum says; download it again")
        unchecked = tuple(path.name for path in shards if path not in expected)
        return CheckedFiles(tuple(path.name for path in expected), unchecked)


def open_safetensors(folder: Path) -> SafetensorsFolder:
    """Read the headers of the shards in `folder`, and hold the index, where there is one, against them.

    An index that disagrees with the shards gives way to them, with a notice, as long as no tensor is lost by it.
    Files of another family than the model's (consolidated.safetensors beside model-00001-of-00002.safetensors)
    hold the same weights once more under other names, or an adapter, and are left out, with a notice.

    Raises:
        UserError: there is no such folder, no safetensors in it, shards or tensors are missing, or a file is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give the one that holds the model's *.safetensors")
    shards = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    index = _read_index(folder / INDEX_NAME) if (folder / INDEX_NAME).is_file() else {}
    if not shards and not index:
        raise _no_safetensors(folder)

    named = set(index.values()) or _siblings(shards)
    families = {_family(name) for name in named} or {"model"}
    chosen = [name for name in shards if _family(name) in families] or shards
    places = _merge(folder, chosen)

    missing = sorted(named.difference(shards))
    lost = [name for name in index if name not in places]
    if missing and (lost or not index):
        raise UserError(
            f"{folder / missing[0]}: is missing (one of {len(missing)} missing shards of {len(named)}); "
            "download the folder again"
        )
    if lost:
        raise UserError(
            f"{folder / INDEX_NAME}: names the tensor {lost[0]}, which no shard holds; download the folder again"
        )
    notices = []
    if left_out := [name for name in shards if name not in chosen]:
        notices.append(f"{folder}: {', '.join(left_out)} left out, since the model's shards are others")
    if index and index != {name: place.path.name for name, place in places.items()}:
        notices.append(
            f"{folder / INDEX_NAME}: names {len(named)} shards and {len(index)} tensors and does not fit the "
            f"{len(chosen)} shards with {len(places)} tensors that lie there; their headers are used instead"
        )
    return SafetensorsFolder(folder, places, notices)


def _family(shard: str) -> str:
    match = SHARD_NAME.fullmatch(shard)
    return match["family"] if match else shard


def _siblings(shards: Sequence[str]) -> set[str]:
    """All shards that there must be, by the numbers in the names of some."""
    matches = [match for match in map(SHARD_NAME.fullmatch, shards) if match and match["total"]]
    sets = {(match["family"], match["total"]) for match in matches}
    return {
        f"{family}-{number:05}-of-{total}.safetensors"
        for family, total in sets
        for number in range(1, int(total) + 1)
    }


def _read_index(path: Path) -> dict[str, str]:
    remedy = "download it again, or remove it to go by the shards that lie there"
    weight_map = read_json_object(path, remedy).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{path}: has no weight_map from tensors to shards; {remedy}")
    for shard in weight_map.values():
        refuse_other_folders(path, shard)
    return weight_map


def _no_safetensors(folder: Path) -> UserError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return UserError(
            f"{folder}: safetensors wanted, but the weights are pickles ({pickles[0]}), which may run code when "
            "they are read; re-save the model with transformers (save_pretrained with safe_serialization=True)"
        )
    return UserError(f"{folder}: holds no *.safetensors; give the folder of a Hugging Face model")


def _merge(folder: Path, shards: Iterable[str]) -> dict[str, TensorPlace]:
    places: dict[str, TensorPlace] = {}
    for shard in shards:
        found = read_header(folder / shard)
        if twice := sorted(found.keys() & places.keys()):
            other = places[twice[0]].path.name
            raise UserError(
                f"{folder / shard}: holds {twice[0]}, as {other} does; remove the file that is not of the model"
            )
        places |= found
    return places


def plan_shards(
    facts: Mapping[str, TensorFacts], names: Iterable[str], shard_bytes: int
) -> dict[str, dict[str, TensorFacts]]:
    """Deal tensors to shards: by the shard's file name, its tensors in the order of their data.

    A shard takes tensors in the order of `names` while their data stay within `shard_bytes`; a tensor that is larger
    has a shard of its own. Inside a shard the tensors with larger elements come first, as in the library's files:
    so each lies at a multiple of its element size, which readers that map the file rely on.
    """
    groups: list[list[str]] = [[]]
    filled_bytes = 0
    for name in names:
        if groups[-1] and filled_bytes + facts[name].bytes > shard_bytes:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(name)
        filled_bytes += facts[name].bytes
    count = len(groups)
    files = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        files = ["model.safetensors"]
    return {
        file: {name: facts[name] for name in sorted(group, key=lambda name: -facts[name].dtype.itemsize)}
        for file, group in zip(files, groups, strict=True)
    }


def write_safetensors(
    folder: Path,
    reader: TensorReader,
    names: Sequence[str],
    shard_bytes: int,
    *,
    metadata: Mapping[str, str] = PYTORCH_FORMAT,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> None:
    """Write tensors of `reader` into `folder`: shards, their index if there are several, and checksums.

    Memory: one tensor as the reader gives it, and a few blocks. When it returns, all is on the disk.

    Args:
        folder: an empty folder; the caller publishes it (`data_prep.output_files.folder_written_whole`).
        reader: where the tensors come from.
        names: which of them, each once, in the order of the shards.
        shard_bytes: most bytes of data in a shard, unless a single tensor has more.
        metadata: texts that every header carries.
        dtype: what tensors of floating point are cast to; others stay as they are.
        progress: show a bar.

    Raises:
        UserError: a tensor's name or type cannot be written.
        IntegrityError: a tensor is not what the reader's facts say.
        OSError: the disk is full (`run_cli` makes it one line) or failed.
    """
    assert len(set(names)) == len(names), "a tensor is named twice"
    planned = {name: _after_cast(reader.facts[name], dtype) for name in names}
    plan = plan_shards(planned, names, shard_bytes)
    headers = {file: header_of(tensors, metadata) for file, tensors in plan.items()}  # fails before any data
    total_bytes = sum(facts.bytes for facts in planned.values())
    sums = {}
    with progress_bar("write", total_bytes, unit="B", unit_scale=True, shown=progress) as bar:
        for file, tensors in plan.items():
            sums[file] = _write_shard(folder / file, headers[file], tensors, reader, bar.update)
    if len(plan) > 1:
        write_json_whole(folder / INDEX_NAME, _index_of(plan))
        sums[INDEX_NAME] = file_sum(folder / INDEX_NAME, CHECKSUM_LIST)
    write_checksum_list(folder, sums)


def _after_cast(facts: TensorFacts, dtype: torch.dtype | None) -> TensorFacts:
    return TensorFacts(facts.shape, dtype) if dtype and facts.dtype.is_floating_point else facts


def _index_of(plan: Mapping[str, Mapping[str, TensorFacts]]) -> dict[str, object]:
    tensors = [facts for shard in plan.values() for facts in shard.values()]
    elements = sum(facts.numel for facts in tensors)
    return {
        "metadata": {"total_parameters": elements, "total_size": sum(facts.bytes for facts in tensors)},
        "weight_map": dict(sorted((name, file) for file, shard in plan.items() for name in shard)),
    }


def _write_shard(
    path: Path,
    header: bytes,
    tensors: Mapping[str, TensorFacts],
    reader: TensorReader,
    report: Callable[[int], object],
) -> str:
    """Returns the file's checksum, of what was written; its bytes are on the disk."""
    digest = DIGESTS[CHECKSUM_LIST]()
    with path.open("wb") as stream, BackgroundFlush(path) as flush:
        digest.update(memoryview(header))
        stream.write(header)
        for name, tensor in read_ahead(reader, tensors):
            for block in _blocks(tensor, tensors[name].dtype):
                digest.update(block)
                stream.write(block)
                report(len(block))
            del tensor, block  # before the next one is waited for
            flush.start()
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _blocks(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The tensor's bytes after a cast to `dtype`, a block at a time."""
    for part in tensor.detach().reshape(-1).split(BLOCK_BYTES // dtype.itemsize):
        yield part.to(dtype).view(torch.uint8).numpy().data
