"""Random keys that belong to a document, not to a run: a hash of a stream's name and the document's number.

Sorting documents by their keys puts them in a random order, and a process that is interested in a few of them
need not know the others. The hash is splitmix64's: multiplications and shifts of 64 bits that give the same
numbers on every machine and with every version of numpy. Within a stream no two keys are equal, since the
hash is a bijection of the 64-bit numbers.
"""

import hashlib
import json

import numpy as np

KEY_BITS = 64
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its multiples are all different modulo 2^64
FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def key_stream(*name: object) -> np.uint64:
    """Where the keys of a stream start, from everything that names it."""
    digest = hashlib.sha256(json.dumps([str(part) for part in name]).encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def mix(numbers: np.ndarray) -> np.ndarray:
    """Scatter 64-bit numbers as if by chance, each to another one. [n] uint64; overwrites its argument."""
    numbers ^= numbers >> SHIFTS[0]
    numbers *= FACTORS[0]
    numbers ^= numbers >> SHIFTS[1]
    numbers *= FACTORS[1]
    numbers ^= numbers >> SHIFTS[2]
    return numbers


def document_keys(stream: np.uint64, first: int, count: int) -> np.ndarray:
    """Keys of the documents numbered `first` to `first` + `count` - 1 of a stream. [count] uint64."""
    numbers = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    numbers *= GOLDEN_RATIO
    numbers += stream
    return mix(numbers)


def random_order(stream: np.uint64, count: int) -> np.ndarray:
    """A random order of `count` things: their numbers sorted by key. [count] int64."""
    return np.argsort(document_keys(stream, 0, count))
