"""Find documents that share 13 tokens in a row with a benchmark's prompts, so that they can be dropped.

    benchmarks = BenchmarkNgrams.from_files([Path("math500.jsonl.gz")], tokenizer.encode_batch)
    is_contaminated = benchmarks.contaminated(tokens, lengths_tokens)

The answer is exact, at a few nanoseconds a token. Any 13 tokens in a row hold the 8 tokens ("anchor") that begin
at one of the places 0, 6, 12, ... of the text, so only every sixth place is looked up, in a table of the prompts'
anchors that says no to nearly all. Around the few anchors that are left the windows of 13 tokens are looked up by
their hash and then compared token by token.

Prompts are read from JSON lines (.jsonl, .jsonl.gz, .jsonl.zst); in each row every string under "prompt",
"problem", "question", "passage" or "text" counts. Nothing is written.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import xxhash

from data_prep.errors import InputDataError, UserError

PROMPT_FIELDS = ("prompt", "problem", "question", "passage", "text")
ACCEPTED = "a string under " + " or ".join(f'"{name}"' for name in PROMPT_FIELDS)
WINDOW_TOKENS = 13
ANCHOR_TOKENS = 8
STRIDE_TOKENS = WINDOW_TOKENS - ANCHOR_TOKENS + 1
ENCODE_TEXTS = 1024
TABLE_BYTES_PER_HASH = 4
MIN_TABLE_BITS = 16
# Four of a byte's eight bits, in 64 of the 70 ways: what one hash sets in the table.
MASKS = np.array([byte for byte in range(256) if byte.bit_count() == 4][:64], dtype=np.uint8)
MASK_BITS = np.uint64(6)

Encode = Callable[[list[str]], Sequence[Sequence[int] | np.ndarray]]


def _odd_factors(count: int, seed: str) -> np.ndarray:
    """Fixed numbers to multiply tokens with; the fingerprint depends on them. [count] uint64, odd."""
    numbers = [xxhash.xxh3_64_intdigest(f"{seed} {place}".encode()) | 1 for place in range(count)]
    return np.array(numbers, dtype=np.uint64)


WINDOW_FACTORS = _odd_factors(WINDOW_TOKENS, "window")
# An anchor is hashed as four pairs of tokens, each read as one number of 64 bits: half the multiplications.
PAIR_FACTORS = _odd_factors(ANCHOR_TOKENS // 2, "anchor")
ANCHOR_FACTORS = np.stack([PAIR_FACTORS, PAIR_FACTORS << np.uint64(32)], axis=1).ravel()


def hash_at(tokens: np.ndarray, starts: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Hash the len(factors) tokens from each start on: their sum, weighted by `factors`, modulo 2^64.

    Args:
        tokens: [tokens] uint32.
        starts: [n] integers.
        factors: [length] uint64.

    Returns:
        [n] uint64, whose upper bits are well mixed.
    """
    total = np.zeros(len(starts), np.uint64)
    for offset, factor in enumerate(factors):
        total += tokens[starts + offset] * factor
    return total


def hash_strided_anchors(tokens: np.ndarray) -> np.ndarray:
    """Hash the 8 tokens from every sixth place on, as `hash_at` with ANCHOR_FACTORS does, but faster.

    Args:
        tokens: [tokens] uint32, contiguous.

    Returns:
        [anchors] uint64.
    """
    pairs = tokens[: len(tokens) // 2 * 2].view(np.dtype("<u8"))
    pair_stride = STRIDE_TOKENS // 2
    count = max(0, (len(tokens) - ANCHOR_TOKENS) // STRIDE_TOKENS + 1)
    total = np.zeros(count, np.uint64)
    for offset, factor in enumerate(PAIR_FACTORS):
        total += pairs[offset : offset + count * pair_stride : pair_stride] * factor
    return total


class HashFilter:
    """A set of hashes that never misses a member, and takes under 1 % of other hashes for one.

    A Bloom filter in which all bits of one hash lie in one byte, so that a look-up reads memory once.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        """Args: hashes: [n] uint64, the members."""
        table_bits = max(MIN_TABLE_BITS, (TABLE_BYTES_PER_HASH * len(hashes)).bit_length())
        self._place_shift = np.uint64(64 - table_bits)
        self._mask_shift = self._place_shift - MASK_BITS
        self._table = np.zeros(1 << table_bits, np.uint8)
        np.bitwise_or.at(self._table, self._places(hashes), self._masks(hashes))

    def possible(self, hashes: np.ndarray) -> np.ndarray:
        """Return the indices of those hashes that may be members, in rising order. [found] int64."""
        stored = self._table.take(self._places(hashes))
        rest = np.flatnonzero(stored != 0)
        masks = self._masks(hashes[rest])
        return rest[stored[rest] & masks == masks]

    def _places(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes >> self._place_shift).view(np.int64)

    def _masks(self, hashes: np.ndarray) -> np.ndarray:
        return MASKS[(hashes >> self._mask_shift) & np.uint64(len(MASKS) - 1)]


class BenchmarkNgrams:
    """All 13 tokens in a row ("windows") of a set of prompts, to compare documents with."""

    prompts: int
    """Different texts in the benchmark files."""
    short_prompts: int
    """Texts of fewer than 13 tokens among them, which can match nothing."""
    fingerprint: str
    """Hash of the set of windows: equal where the same documents are found."""

    def __init__(self, prompts_tokens: Sequence[Sequence[int] | np.ndarray]) -> None:
        """Args: prompts_tokens: the token ids of each prompt."""
        prompts = [np.asarray(ids, dtype=np.uint32) for ids in prompts_tokens]
        long = [ids for ids in prompts if len(ids) >= WINDOW_TOKENS]
        self.prompts, self.short_prompts = len(prompts), len(prompts) - len(long)
        self._tokens = np.concatenate([np.zeros(0, np.uint32), *long])
        lengths = np.array([len(ids) for ids in long], dtype=np.int64)
        anchors = hash_at(self._tokens, _starts_within(lengths, ANCHOR_TOKENS), ANCHOR_FACTORS)
        self._anchor_filter = HashFilter(anchors)
        self._starts, self._hashes = _sort_windows(self._tokens, _starts_within(lengths, WINDOW_TOKENS))
        self._window_filter = HashFilter(self._hashes)
        digest = xxhash.xxh3_128(f"{WINDOW_TOKENS} tokens: ".encode())
        is_first = np.diff(self._hashes, prepend=~self._hashes[:1]) != 0
        digest.update(self._hashes[is_first].tobytes())
        self.fingerprint = digest.hexdigest()

    @classmethod
    def from_files(cls, paths: Sequence[Path], encode: Encode) -> Self:
        """Read the prompts in JSON lines files and turn them into tokens.

        Args:
            paths: the files.
            encode: gives the token ids of each text, without BOS and EOS.

        Raises:
            UserError: a file is missing or empty, or no prompt is long enough to be found.
            InputDataError: a row is not JSON or holds no prompt.
        """
        texts = list(dict.fromkeys(text for path in paths for text in read_prompts(path)))
        tokens: list[np.ndarray] = []
        for first in range(0, len(texts), ENCODE_TEXTS):
            tokens += [np.asarray(ids, np.uint32) for ids in encode(texts[first : first + ENCODE_TEXTS])]
        ngrams = cls(tokens)
        if ngrams.short_prompts == ngrams.prompts:
            raise UserError(
                f"{', '.join(map(str, paths))}: no prompt has {WINDOW_TOKENS} tokens, so that none can be found "
                "in a document; give longer prompts or leave the file out"
            )
        return ngrams

    @property
    def windows(self) -> int:
        """Different windows of 13 tokens in the prompts."""
        return len(self._starts)

    def contaminated(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Say of each document whether 13 tokens in a row of it stand in a prompt, too.

        Args:
            tokens: [sum of lengths] token ids of the documents, one after another.
            lengths: [documents] integers; tokens of each document.

        Returns:
            [documents] bool.
        """
        tokens = np.ascontiguousarray(tokens, dtype=np.uint32)
        ends = np.cumsum(lengths, dtype=np.int64)
        found = np.zeros(len(ends), bool)
        anchors = self._anchor_filter.possible(hash_strided_anchors(tokens)) * STRIDE_TOKENS
        starts, documents = _windows_around(anchors, ends)
        hashes = hash_at(tokens, starts, WINDOW_FACTORS)
        rest = self._window_filter.possible(hashes)
        starts, documents, hashes = starts[rest], documents[rest], hashes[rest]
        # One window is enough for a document, so the first of each goes before all others.
        is_first = np.diff(documents, prepend=-1) != 0
        for turn in (is_first, ~is_first):
            chosen = np.flatnonzero(turn & ~found[documents])
            equal = self._are_windows(_windows_at(tokens, starts[chosen]), hashes[chosen])
            found[documents[chosen[equal]]] = True
        return found

    def _are_windows(self, windows: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        """Compare windows with those of the prompts that have the same hash.

        Args:
            windows: [n, 13] uint32.
            hashes: [n] uint64.

        Returns:
            [n] bool.
        """
        equal = np.zeros(len(windows), bool)
        places = self._hashes.searchsorted(hashes, side="left")
        last_places = self._hashes.searchsorted(hashes, side="right")
        while (rest := np.flatnonzero(~equal & (places < last_places))).size:
            candidates = _windows_at(self._tokens, self._starts[places[rest]])
            equal[rest] = (candidates == windows[rest]).all(axis=1)
            places += 1
        return equal


def _starts_within(lengths: np.ndarray, size_tokens: int) -> np.ndarray:
    """Where `size_tokens` in a row begin that lie inside one text. lengths: [texts], none shorter; [n] int64."""
    starts = np.arange(lengths.sum())
    ends = np.repeat(np.cumsum(lengths), lengths)
    return starts[starts + size_tokens <= ends]


def _windows_around(anchors: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the windows that hold an anchor and lie inside one document.

    Args:
        anchors: [anchors] int64 places, in rising order.
        ends: [documents] int64, where each document ends.

    Returns:
        starts [n] int64, documents [n] int64 in rising order.
    """
    documents = ends.searchsorted(anchors, side="right")  # an empty document holds no place
    ends_of = ends[documents]
    begins_of = np.append(0, ends)[documents]
    starts = anchors[:, None] - np.arange(STRIDE_TOKENS)
    inside = (starts >= begins_of[:, None]) & (starts + WINDOW_TOKENS <= ends_of[:, None])
    return starts[inside], documents[inside.nonzero()[0]]


def _windows_at(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the tokens of windows. [n, 13] uint32."""
    return tokens[starts[:, None].astype(np.int64) + np.arange(WINDOW_TOKENS)]


def _sort_windows(tokens: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort windows by their hash and leave out copies. Returns starts [n] uint32, hashes [n] uint64."""
    hashes = hash_at(tokens, starts, WINDOW_FACTORS)
    order = np.argsort(hashes)
    starts, hashes = starts[order].astype(np.uint32), hashes[order]
    same = np.flatnonzero(hashes[1:] == hashes[:-1])
    is_copy = (_windows_at(tokens, starts[same]) == _windows_at(tokens, starts[same + 1])).all(axis=1)
    kept = np.ones(len(starts), bool)
    kept[same[is_copy] + 1] = False
    return starts[kept], hashes[kept]


def read_prompts(path: Path) -> Iterator[str]:
    """Yield every prompt of a JSON lines file.

    Raises:
        UserError: the file is missing or has no rows.
        InputDataError: the file or a row of it is damaged, or a row holds no prompt.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is no file; give the JSON lines of a benchmark (.jsonl, .jsonl.gz, .jsonl.zst)"
        )
    try:
        content = pa.input_stream(str(path)).read()  # decompresses by the name's ending
    except (OSError, pa.ArrowException) as error:
        raise InputDataError(f"{path}: cannot be read ({error}); fetch the file again") from error
    is_empty = True
    for number, line in enumerate(content.split(b"\n"), 1):
        if line and not line.isspace():
            is_empty = False
            yield from _prompts_of_row(line, f"{path}: row {number}")
    if is_empty:
        raise UserError(f"{path}: has no rows; every row has to hold {ACCEPTED}")


def _prompts_of_row(line: bytes, where: str) -> list[str]:
    """Return the prompts of one row. Raises InputDataError naming `where` when there are none."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputDataError(f"{where} is not JSON ({error}); every row has to hold {ACCEPTED}") from error
    values = [row.get(name) for name in PROMPT_FIELDS] if isinstance(row, dict) else []
    prompts = [value for value in values if isinstance(value, str)]
    if not prompts:
        raise InputDataError(f"{where} holds no prompt; it needs {ACCEPTED}")
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError as error:
        raise InputDataError(f"{where} holds half of a surrogate pair; remove it from the text") from error
    return prompts
