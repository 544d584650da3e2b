"""Find the documents of some shards: one scan of the index for as many shards as fit into memory together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.blending.cuts import Cuts
from data_prep.blending.keys import document_keys, random_order
from data_prep.blending.sources import Advance, SourceSplit, scan_documents

GROUP_DOCUMENTS = 16_000_000  # in memory at a time, 18 bytes each; every group costs a scan of the index
GROUP_SHARDS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class ShardStream:
    """One pass over a source's documents in a random order, cut into shards.

    Shard i holds the documents between cut i and cut i + 1.
    """

    split: SourceSplit
    first_unit: int
    """Number of the split's first unit among the units of all sources."""
    stream: np.uint64
    """Of the documents' keys."""
    cuts: Cuts

    def documents_of(self, shard: int) -> int:
        """Documents of a shard."""
        return self.cuts.documents_before(shard + 1) - self.cuts.documents_before(shard)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Where documents lie in the units of all sources; one entry a document in each array."""

    units: np.ndarray
    """int32, numbered through all sources."""
    lengths_tokens: np.ndarray
    """int32, EOS included."""
    offsets_tokens: np.ndarray
    """Where the document begins in its unit's .bin. int64."""

    def __len__(self) -> int:
        return len(self.units)

    def take(self, chosen: np.ndarray | slice) -> "Documents":
        """Some of the documents."""
        return Documents(
            units=self.units[chosen],
            lengths_tokens=self.lengths_tokens[chosen],
            offsets_tokens=self.offsets_tokens[chosen],
        )


def groups_of_shards(streams: Sequence[ShardStream], shards: Sequence[int]) -> Iterator[list[int]]:
    """Put shards together whose documents fit into memory at the same time; a single one always does."""
    group: list[int] = []
    total = 0
    for shard in shards:
        documents = sum(stream.documents_of(shard) for stream in streams)
        if group and (total + documents > GROUP_DOCUMENTS or len(group) == GROUP_SHARDS):
            yield group
            group, total = [], 0
        group.append(shard)
        total += documents
    if group:
        yield group


class ShardGroup:
    """The documents of some shards."""

    def __init__(
        self, streams: Sequence[ShardStream], shards: Sequence[int], advance: Advance | None = None
    ) -> None:
        """Scan the index of every source that has documents in them."""
        counts = [sum(stream.documents_of(shard) for shard in shards) for stream in streams]
        self._shards = list(shards)
        self._slots = np.empty(sum(counts), np.int16)  # which of the shards a document belongs to
        self._documents = Documents(
            units=np.empty(sum(counts), np.int32),
            lengths_tokens=np.empty(sum(counts), np.int32),
            offsets_tokens=np.empty(sum(counts), np.int64),
        )
        filled = 0
        for stream, count in zip(streams, counts, strict=True):
            if count:
                filled = self._fill(stream, filled, advance)
        assert filled == sum(counts), f"{filled} documents where {sum(counts)} were counted"

    def in_written_order(self, shard: int, stream: np.uint64) -> Documents:
        """The documents of one of the shards in a random order, which `stream` decides."""
        chosen = np.flatnonzero(self._slots == self._shards.index(shard))
        return self._documents.take(chosen[random_order(stream, len(chosen))])

    def _fill(self, stream: ShardStream, filled: int, advance: Advance | None) -> int:
        """Append a stream's documents behind the `filled` first ones; return how many there are then."""
        low, high = min(self._shards), max(self._shards) + 1
        cut_keys = stream.cuts.keys
        slot_of_shard = np.full(high - low, -1, np.int16)
        slot_of_shard[np.array(self._shards) - low] = np.arange(len(self._shards))
        for stretch in scan_documents(stream.split, advance):
            keys = document_keys(stream.stream, stretch.first_document, len(stretch.lengths_tokens))
            is_hit = keys >= cut_keys[low]
            if high < len(cut_keys):
                is_hit &= keys < cut_keys[high]
            hits = np.flatnonzero(is_hit)
            slots = slot_of_shard[np.searchsorted(cut_keys[low : high + 1], keys[hits], side="right") - 1]
            hits, slots = hits[slots >= 0], slots[slots >= 0]
            place = slice(filled, filled + len(hits))
            lengths = stretch.lengths_tokens
            self._slots[place] = slots
            self._documents.units[place] = stream.first_unit + stretch.unit
            self._documents.lengths_tokens[place] = lengths[hits]
            self._documents.offsets_tokens[place] = (
                stretch.first_offset_tokens + (np.cumsum(lengths) - lengths)[hits]
            )
            filled += len(hits)
        return filled
