"""Which documents go into which shard of a blend: a pure function of the seed and the sources' manifests.

Every source's documents are put in a random order and its stream of tokens is cut into as many equal pieces
as there are shards; shard i takes piece i of every source and shuffles their documents. So every shard, and
every prefix of the list of shards, is itself a correct blend in a globally random order. Index memory: 12
bytes a document, and 16 more of the source that is being put in order.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.indexed_shards import (
    FORMAT_VERSION,
    UNITS_FILE,
    UnitManifest,
    manifest_path,
    read_index,
    read_unit_manifest,
    token_dtype,
)
from data_prep.output_files import read_json_object
from data_prep.text_tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class SourceShards:
    """The tokenized shards of one source and split, as one long list of documents."""

    name: str
    prefixes: list[Path]
    """Shards in the order of their unit names."""
    bin_sha256: list[str]
    first_documents: np.ndarray
    """Number of the first document of every shard, and the number of all documents at the end (int64)."""
    lengths_tokens: np.ndarray
    """Length of every document, EOS included (int32)."""
    offsets_tokens: np.ndarray
    """Where every document begins in its shard (int64)."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.lengths_tokens)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.lengths_tokens.sum(dtype=np.int64))


def load_source(folder: Path, name: str, split: str, tokenizer: TextTokenizer) -> SourceShards:
    """Read the manifests and indexes of a source's shards.

    Raises:
        UserError: shards are missing, unfinished, damaged, of another source, or made with another tokenizer.
    """
    prefixes, hashes, lengths = [], [], []
    for manifest, prefix in _finished_units(folder, name, split):
        if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{prefix}.json: made with another tokenizer than --tokenizer; tokenize {name} again with "
                f"--overwrite, or give the tokenizer that made it"
            )
        index = read_index(prefix)
        if len(index.lengths_tokens) != manifest.documents or index.tokens != manifest.tokens:
            raise UserError(f"{prefix}.idx does not hold what its manifest says; tokenize {name} again")
        prefixes.append(prefix)
        hashes.append(manifest.bin_sha256)
        lengths.append(index.lengths_tokens)
    counts = np.array([0, *(len(part) for part in lengths)], dtype=np.int64)
    offsets = [np.cumsum(part, dtype=np.int64) - part for part in lengths]
    return SourceShards(
        name=name,
        prefixes=prefixes,
        bin_sha256=hashes,
        first_documents=np.cumsum(counts),
        lengths_tokens=np.concatenate([np.empty(0, np.int32), *lengths]),
        offsets_tokens=np.concatenate([np.empty(0, np.int64), *offsets]),
    )


def _finished_units(folder: Path, name: str, split: str) -> Iterator[tuple[UnitManifest, Path]]:
    """Yield manifest and prefix of each unit that the tokenization planned, in the order of their names."""
    remedy = f"run data_prep/tokenize_corpus.py --source {name} --output {folder}"
    if not (folder / UNITS_FILE).is_file():
        raise UserError(f"{folder} holds no tokenized corpus; {remedy}")
    plan = read_json_object(folder / UNITS_FILE, f"{remedy} --overwrite")
    units = plan.get(split)
    if plan.get("source") != name or not isinstance(units, list):
        raise UserError(f"{folder / UNITS_FILE}: is of source {plan.get('source')}, not {name}; {remedy}")
    for unit in sorted(map(str, units)):
        prefix = folder / split / unit
        if not manifest_path(prefix).is_file():
            raise UserError(f"{prefix} is not finished; {remedy} --resume")
        yield read_unit_manifest(manifest_path(prefix)), prefix


def generator(*key: object) -> np.random.Generator:
    """A stream of random numbers that depends on nothing but `key`."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def random_order(count: int, *key: object) -> np.ndarray:
    """A random order of `count` things (uint32)."""
    order = np.arange(count, dtype=np.uint32)
    generator(*key).shuffle(order)
    return order


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """How much of one source goes into the blend."""

    shards: SourceShards
    weight: float
    """Share of the blend's tokens."""
    tokens_wanted: int

    @property
    def epochs(self) -> float:
        """How often the source's documents are used on average."""
        return self.tokens_wanted / self.shards.tokens

    def documents_of_shards(self, shard_count: int, seed: int) -> list[np.ndarray]:
        """Return, for every shard, the numbers of this source's documents in it (uint32; repeats if wanted).

        A document belongs to the shard in which its middle token lies, so a source gets its wanted tokens up
        to half a document.
        """
        pieces: list[list[np.ndarray]] = [[] for _ in range(shard_count)]
        # In half tokens, to keep the middles whole numbers.
        boundaries = np.array([2 * self.tokens_wanted * i // shard_count for i in range(shard_count + 1)])
        start_tokens = epoch = 0
        while start_tokens < self.tokens_wanted and self.shards.tokens:
            order = random_order(self.shards.documents, seed, self.shards.name, "epoch", epoch)
            lengths = self.shards.lengths_tokens[order]
            middles = np.cumsum(lengths, dtype=np.int64)  # ends so far; in place, for the memory's sake
            middles *= 2
            middles -= lengths
            middles += 2 * start_tokens
            cuts = np.searchsorted(middles, boundaries)
            for piece, begin, end in zip(pieces, cuts, cuts[1:], strict=False):
                piece.append(order[begin:end])
            start_tokens += self.shards.tokens
            epoch += 1
        return [np.concatenate([np.empty(0, np.uint32), *piece]) for piece in pieces]


@dataclass(frozen=True, kw_only=True)
class BlendPlan:
    """The whole blend before anything is written."""

    seed: int
    shard_count: int
    train: dict[str, SourcePlan]
    validation: dict[str, SourceShards]
    validation_tokens: int
    """Validation tokens taken from each source, at most."""
    tokenizer_fingerprint: str
    dtype: np.dtype
    """Number type of the tokens in all shards."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the blend's bytes."""
        content = {
            "format_version": FORMAT_VERSION,
            "seed": self.seed,
            "shard_count": self.shard_count,
            "tokenizer": self.tokenizer_fingerprint,
            "validation_tokens": self.validation_tokens,
            "train": {
                name: [plan.tokens_wanted, plan.shards.bin_sha256] for name, plan in self.train.items()
            },
            "validation": {name: shards.bin_sha256 for name, shards in self.validation.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def validation_documents(self, source: str) -> np.ndarray:
        """Numbers of the validation documents taken from a source, in the order in which they are written."""
        shards = self.validation[source]
        order = random_order(shards.documents, self.seed, source, "validation")
        starts = np.cumsum(shards.lengths_tokens[order], dtype=np.int64) - shards.lengths_tokens[order]
        return order[starts < self.validation_tokens]

    def shuffled_train_shards(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (source numbers, document numbers) of every train shard, in the order of writing.

        A source's number is its place in `train`.
        """
        pieces = [plan.documents_of_shards(self.shard_count, self.seed) for plan in self.train.values()]
        for shard in range(self.shard_count):
            documents = np.concatenate([source_pieces[shard] for source_pieces in pieces])
            counts = [len(source_pieces[shard]) for source_pieces in pieces]
            sources = np.repeat(np.arange(len(pieces), dtype=np.uint8), counts)
            order = random_order(len(documents), self.seed, "shard", shard)
            yield sources[order], documents[order]


def make_plan(
    *,
    tokenized: Path,
    tokenizer: TextTokenizer,
    weights: dict[str, float],
    total_tokens: int,
    shard_tokens: int,
    validation_tokens: int,
    seed: int,
    allow_repeats: bool,
) -> BlendPlan:
    """Plan a blend from the manifests and indexes of the sources.

    Raises:
        UserError: shards that cannot be used, a source without validation documents, or one that is too small
            while repeats are not allowed (all such sources are named at once).
    """
    total_weight = sum(weights.values())
    used = {name: weight / total_weight for name, weight in weights.items() if weight > 0}
    train, validation = {}, {}
    for name, weight in used.items():
        shards = load_source(tokenized / name, name, "train", tokenizer)
        train[name] = SourcePlan(shards=shards, weight=weight, tokens_wanted=round(weight * total_tokens))
        validation[name] = load_source(tokenized / name, name, "validation", tokenizer)
    empty = [name for name in used if not train[name].shards.tokens or not validation[name].tokens]
    if empty:
        raise UserError(
            f"no train or no validation documents in {', '.join(empty)} under {tokenized}; tokenize more"
        )
    small = [name for name, plan in train.items() if plan.tokens_wanted > plan.shards.tokens]
    if small and not allow_repeats:
        listing = "; ".join(
            f"{name} has {train[name].shards.tokens:,} tokens of {train[name].tokens_wanted:,} wanted"
            for name in small
        )
        largest = int(min(plan.shards.tokens / plan.weight for plan in train.values()))
        raise UserError(f"{listing}; lower --total-tokens to {largest:,} or pass --allow-repeats")
    return BlendPlan(
        seed=seed,
        shard_count=max(1, round(total_tokens / shard_tokens)),
        train=train,
        validation=validation,
        validation_tokens=validation_tokens,
        tokenizer_fingerprint=tokenizer.fingerprint,
        dtype=token_dtype(tokenizer.vocab_size),
    )
