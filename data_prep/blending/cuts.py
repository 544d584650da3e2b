"""Cut a source's randomly ordered documents at given numbers of tokens, without ever sorting them all.

A first scan of the index adds up tokens in a fine histogram over the documents' keys, which says in which bin
every cut lies; a second scan collects the documents of just these bins, whose exact order gives the exact
cut. Memory: 16 bytes a bin, and the documents of as many bins as there are cuts.
"""

from dataclasses import dataclass

import numpy as np

from data_prep.blending.keys import KEY_BITS, document_keys
from data_prep.blending.sources import Advance, SourceSplit, scan_documents

MAX_BIN_BITS = 20


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Places in the order of a split's documents by key; cuts that lie behind the last document are left out."""

    keys: np.ndarray
    """Key of the first document behind each cut, or a lower one in the gap before it. [cuts] uint64."""
    documents: np.ndarray
    """Documents before each cut. [cuts] int64."""
    all_documents: int
    """Documents of the split."""

    def documents_before(self, cut: int) -> int:
        """Documents before a cut, which may lie behind the last document."""
        return int(self.documents[cut]) if cut < len(self.documents) else self.all_documents


def find_cuts(
    split: SourceSplit,
    stream: np.uint64,
    places_half_tokens: np.ndarray,
    *,
    whole_last_document: bool = False,
    advance: Advance | None = None,
) -> Cuts:
    """Find where the documents, in the order of their keys, reach given numbers of tokens.

    Args:
        split: the documents.
        stream: of the keys.
        places_half_tokens: the cuts, ascending, from the first document on and in half tokens, so that the
            middle of a document is a whole number. [cuts] int64.
        whole_last_document: a document lies before a cut when it begins before it; otherwise when its middle
            does.
        advance: is told of documents scanned, for a progress bar.
    """
    at_start = int(np.count_nonzero(places_half_tokens <= 0))
    inner = places_half_tokens[(places_half_tokens > 0) & (places_half_tokens < 2 * split.tokens)]
    keys = documents = np.empty(0, np.int64)
    if len(inner):
        keys, documents = _find_inner_cuts(split, stream, inner, whole_last_document, advance)
    return Cuts(
        keys=np.concatenate([np.zeros(at_start, np.uint64), keys.astype(np.uint64)]),
        documents=np.concatenate([np.zeros(at_start, np.int64), documents]),
        all_documents=split.documents,
    )


def _find_inner_cuts(
    split: SourceSplit, stream: np.uint64, places: np.ndarray, whole_last: bool, advance: Advance | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (keys, documents before) of cuts between the first and the last token."""
    bits = min(MAX_BIN_BITS, split.documents.bit_length())
    shift = np.uint64(KEY_BITS - bits)
    bin_tokens, bin_documents = _count_by_bin(split, stream, shift, advance)
    ends_tokens, ends_documents = np.cumsum(bin_tokens), np.cumsum(bin_documents)
    # The bin of a cut ends at or behind it and begins before it, so it holds documents; those of earlier bins
    # lie before the cut and those of later bins do not.
    bins = np.searchsorted(2 * ends_tokens, places)
    keys, lengths = _documents_of_bins(split, stream, shift, bins, len(bin_tokens), advance)
    own_bins = (keys >> shift).astype(np.int64)
    before = np.cumsum(lengths) - lengths
    first_of_bin = np.searchsorted(own_bins, own_bins)
    starts = (ends_tokens - bin_tokens)[own_bins] + before - before[first_of_bin]
    found = np.searchsorted(2 * starts + (0 if whole_last else lengths), places)
    within = found - np.searchsorted(own_bins, bins)
    documents = (ends_documents - bin_documents)[bins] + within
    is_inside = within < bin_documents[bins]
    next_bins = (bins + 1).astype(np.uint64) << shift
    cut_keys = np.where(is_inside, keys[np.minimum(found, len(keys) - 1)], next_bins)
    exists = is_inside | (bins + 1 < len(bin_tokens))
    return cut_keys[exists], documents[exists]


def _count_by_bin(
    split: SourceSplit, stream: np.uint64, shift: np.uint64, advance: Advance | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and documents of each bin, which is a document's highest key bits. [bins] int64 each."""
    tokens, documents = (np.zeros(1 << (KEY_BITS - int(shift)), np.int64) for _ in range(2))
    for stretch in scan_documents(split, advance):
        keys = document_keys(stream, stretch.first_document, len(stretch.lengths_tokens))
        bins = (keys >> shift).astype(np.int64)
        np.add.at(tokens, bins, stretch.lengths_tokens)
        np.add.at(documents, bins, 1)
    return tokens, documents


def _documents_of_bins(
    split: SourceSplit,
    stream: np.uint64,
    shift: np.uint64,
    bins: np.ndarray,
    bin_count: int,
    advance: Advance | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return keys (uint64) and lengths (int64) of the documents of some bins, in the order of their keys."""
    is_wanted = np.zeros(bin_count, bool)
    is_wanted[bins] = True
    parts = []
    for stretch in scan_documents(split, advance):
        keys = document_keys(stream, stretch.first_document, len(stretch.lengths_tokens))
        hits = np.flatnonzero(is_wanted[(keys >> shift).astype(np.int64)])
        if len(hits):
            parts.append((keys[hits], stretch.lengths_tokens[hits]))
    keys = np.concatenate([part for part, _ in parts])
    lengths = np.concatenate([part for _, part in parts])
    order = np.argsort(keys)
    return keys[order], lengths[order]
