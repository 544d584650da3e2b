"""Which document goes where in a blend: a pure function of the seed and the sources' manifests.

Every source's documents are put in a random order, anew in every epoch, and this stream of tokens is cut into
as many equal pieces as there are shards; shard i takes piece i of every source and shuffles their documents.
So every shard, and every prefix of the list of shards, is itself a correct blend in a globally random order.

The plan itself needs the manifests alone. Which documents these are is worked out by `train_streams`, which
scans the index; memory does not grow with the number of documents (cuts.py says how).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.blended_data import BLEND_FORMAT_VERSION
from data_prep.blending.cuts import find_cuts
from data_prep.blending.gather import ShardStream
from data_prep.blending.keys import key_stream
from data_prep.blending.sources import Advance, SourceSplit, check_units, load_source
from data_prep.errors import UserError
from data_prep.indexed_shards import token_dtype
from data_prep.text_tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """How much of one source goes into the blend."""

    split: SourceSplit
    """The source's train units."""
    weight: float
    """Share of the blend's tokens."""
    tokens_wanted: int

    @property
    def epochs(self) -> float:
        """How often the source's documents are used on average."""
        return self.tokens_wanted / self.split.tokens

    def streams(
        self, shard_count: int, seed: int, first_unit: int, advance: Advance | None = None
    ) -> list[ShardStream]:
        """Cut the source into shards, one stream an epoch.

        A document belongs to the shard in which its middle token lies, so a source gets its wanted tokens up
        to half a document.
        """
        places = np.array(
            [2 * self.tokens_wanted * i // shard_count for i in range(shard_count + 1)], np.int64
        )
        streams = []
        for epoch in range(-(-self.tokens_wanted // self.split.tokens)):
            stream = key_stream(seed, "train", self.split.source, "epoch", epoch)
            cuts = find_cuts(self.split, stream, places - 2 * epoch * self.split.tokens, advance=advance)
            streams.append(ShardStream(split=self.split, first_unit=first_unit, stream=stream, cuts=cuts))
        return streams


@dataclass(frozen=True, kw_only=True)
class BlendPlan:
    """The whole blend before anything is written."""

    seed: int
    shard_count: int
    train: dict[str, SourcePlan]
    validation: dict[str, SourceSplit]
    validation_tokens: int
    """Validation tokens taken from each source, at most (the last document is taken whole)."""
    tokenizer_fingerprint: str
    dtype: np.dtype
    """Number type of the tokens in all shards."""

    @property
    def tokens_wanted(self) -> int:
        """Train tokens of all sources."""
        return sum(source.tokens_wanted for source in self.train.values())

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the blend's bytes."""
        content = {
            "format_version": BLEND_FORMAT_VERSION,
            "seed": self.seed,
            "shard_count": self.shard_count,
            "tokenizer": self.tokenizer_fingerprint,
            "validation_tokens": self.validation_tokens,
            # A list, since the sources' order is that of the documents before they are shuffled.
            "train": [[name, plan.tokens_wanted, plan.split.content] for name, plan in self.train.items()],
            "validation": [[name, split.content] for name, split in self.validation.items()],
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def train_prefix(self, shard: int) -> str:
        """Path of a train shard in the blend's folder, without an ending."""
        return f"train/shard_{shard:05d}"

    def validation_prefix(self, source: str) -> str:
        """Path of a source's validation shard in the blend's folder, without an ending."""
        return f"validation/{source}"

    def written_order(self, prefix: str) -> np.uint64:
        """The stream of keys that decides the order of the documents in a shard."""
        return key_stream(self.seed, "shard", prefix)

    def check_files(self) -> None:
        """Raise UserError when a unit's files are not whole, from their sizes alone; reads two numbers of each."""
        for split in (*(source.split for source in self.train.values()), *self.validation.values()):
            check_units(split)

    def train_streams(self, advance: Advance | None = None) -> list[ShardStream]:
        """Cut all sources into the train shards: scans the index, twice for each epoch of a source."""
        streams, first_unit = [], 0
        for plan in self.train.values():
            streams += plan.streams(self.shard_count, self.seed, first_unit, advance)
            first_unit += len(plan.split.units)
        return streams

    def validation_stream(self, source: str) -> ShardStream:
        """The one shard of documents that is taken from a source's validation split."""
        split = self.validation[source]
        stream = key_stream(self.seed, "validation", source)
        places = np.array([0, 2 * self.validation_tokens], np.int64)
        cuts = find_cuts(split, stream, places, whole_last_document=True)
        return ShardStream(split=split, first_unit=0, stream=stream, cuts=cuts)


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
    """Plan a blend from the manifests of the sources alone.

    Raises:
        UserError: units that cannot be used, a source without validation documents, or one that is too small
            while repeats are not allowed (all such sources are named at once).
    """
    total_weight = sum(weights.values())
    used = {name: weight / total_weight for name, weight in weights.items() if weight > 0}
    sources = {name: load_source(tokenized / name, name, tokenizer) for name in used}
    empty = [
        name
        for name, splits in sources.items()
        if not all(splits[part].tokens for part in ("train", "validation"))
    ]
    if empty:
        raise UserError(
            f"no train or no validation documents in {', '.join(empty)} under {tokenized}; tokenize more"
        )
    train = {
        name: SourcePlan(
            split=sources[name]["train"], weight=weight, tokens_wanted=round(weight * total_tokens)
        )
        for name, weight in used.items()
    }
    if not allow_repeats:
        refuse_small_sources(train)
    return BlendPlan(
        seed=seed,
        shard_count=max(1, round(total_tokens / shard_tokens)),
        train=train,
        validation={name: splits["validation"] for name, splits in sources.items()},
        validation_tokens=validation_tokens,
        tokenizer_fingerprint=tokenizer.fingerprint,
        dtype=token_dtype(tokenizer.vocab_size),
    )


def refuse_small_sources(train: dict[str, SourcePlan]) -> None:
    """Raise UserError that names every source with fewer tokens than are wanted of it."""
    small = [name for name, plan in train.items() if plan.tokens_wanted > plan.split.tokens]
    if small:
        listing = "; ".join(
            f"{name} has {train[name].split.tokens:,} tokens of {train[name].tokens_wanted:,} wanted"
            for name in small
        )
        largest = int(min(plan.split.tokens / plan.weight for plan in train.values()))
        raise UserError(f"{listing}; lower --total-tokens to {largest:,} or pass --allow-repeats")
