"""Open a blend for training or evaluation, after a check that costs no time.

    data = open_blend("runs/demo/data")

gives Megatron path prefixes of the train shards and of each source's validation shard, and the tokenizer's
folder.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from data_prep.block_checksums import check_blocks_size
from data_prep.errors import UserError
from data_prep.folder_paths import PathInFolder
from data_prep.indexed_shards import ShardSummary, check_pair
from data_prep.output_files import read_json_object, read_sealed_json

BLEND_FORMAT_VERSION = 3
BLEND_FILE = "blend.json"
TOKENIZER_FOLDER = "tokenizer"
REMEDY = "run data_prep/blend.py (with --resume if it was interrupted)"
REMEDY_ANEW = "blend again with --overwrite"


@dataclass(frozen=True, kw_only=True)
class BlendedShard(ShardSummary):
    """One shard of a blend, as blend.json lists it."""

    prefix: PathInFolder
    """Path under the blend's folder, without an ending."""
    blocks_xxh3_128: str
    """Checksum of the .xxh file, which has one of every block of the .bin."""


@dataclass(frozen=True, kw_only=True)
class BlendTokenizer:
    """The tokenizer that made the tokens."""

    fingerprint: str
    vocab_size: int
    eos_id: int
    path: str
    """Where the tokenizer was when the blend was made; its files are copied into the blend's folder."""
    files: dict[PathInFolder, str]
    """Checksum (xxh3, 128 bits) of each copied file, by name."""


@dataclass(frozen=True, kw_only=True)
class BlendedSource:
    """What one source contributes to the train shards."""

    weight: float
    """Wanted share of the tokens; all weights together are 1."""
    tokens_available: int
    tokens_wanted: int
    tokens_realised: int
    documents: int
    epochs: float
    """Tokens realised for each token available."""


@dataclass(frozen=True, kw_only=True)
class TrainShards:
    """The train shards in order; every prefix of the list is itself a correct blend."""

    shards: list[BlendedShard]


@dataclass(frozen=True, kw_only=True)
class BlendManifest:
    """The content of blend.json, which carries a checksum of its own bytes besides."""

    format_version: int
    seed: int
    plan_fingerprint: str
    """Hash of everything that decided the blend's bytes."""
    tokenizer: BlendTokenizer
    sources: dict[str, BlendedSource]
    train: TrainShards
    validation: dict[str, BlendedShard]
    left_out: dict[str, int]
    """Train documents that were left out while writing, by reason."""


@dataclass(frozen=True, kw_only=True)
class BlendedData:
    """A blend that is ready for use."""

    folder: Path
    train_prefixes: list[str]
    """Absolute prefixes for Megatron's IndexedDataset, in order."""
    train_tokens: list[int]
    """Tokens in each train shard."""
    validation_prefixes: dict[str, str]
    """Absolute prefix of each source's validation shard."""
    validation_tokens: dict[str, int]
    """Tokens in each source's validation shard."""
    shards: dict[str, BlendedShard]
    """What each of these prefixes stands for."""
    weights: dict[str, float]
    """Wanted share of each source's tokens; 1 together."""
    vocab_size: int
    eos_id: int
    tokenizer_fingerprint: str
    tokenizer_folder: Path
    plan_fingerprint: str
    """Hash of everything that decided the shards' bytes."""


def read_blend_manifest(folder: Path) -> BlendManifest:
    """Read a blend's manifest. Raises UserError when the folder is no finished blend."""
    path = folder / BLEND_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a finished blend: it has no {BLEND_FILE}; {REMEDY}")
    content = read_json_object(path, REMEDY)  # its version first: an older one has no seal
    if (version := content.get("format_version")) != BLEND_FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, not {BLEND_FORMAT_VERSION}; {REMEDY_ANEW}")
    try:
        return TypeAdapter(BlendManifest).validate_python(read_sealed_json(path, REMEDY))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {place}: {first['msg']}; {REMEDY}") from error


def open_blend(folder: str | Path) -> BlendedData:
    """Open a blend and check that the files of every shard are whole, from sizes alone.

    Raises:
        UserError: no finished blend, a file is missing, or a .bin, .idx, .xxh and the manifest do not fit.
    """
    folder = Path(folder).absolute()
    manifest = read_blend_manifest(folder)
    shards = (*manifest.train.shards, *manifest.validation.values())
    for shard in shards:
        counts = check_pair(folder / shard.prefix)
        if counts != (shard.documents, shard.tokens):
            raise UserError(
                f"{folder / shard.prefix}.idx holds {counts[0]:,} documents and {counts[1]:,} tokens where "
                f"{BLEND_FILE} says {shard.documents:,} and {shard.tokens:,}; {REMEDY_ANEW}"
            )
        check_blocks_size(folder / shard.prefix, shard.bin_bytes)
    tokenizer_folder = folder / TOKENIZER_FOLDER
    if not tokenizer_folder.is_dir():
        raise UserError(f"{tokenizer_folder} is missing; {REMEDY_ANEW}")
    return BlendedData(
        folder=folder,
        train_prefixes=[str(folder / shard.prefix) for shard in manifest.train.shards],
        train_tokens=[shard.tokens for shard in manifest.train.shards],
        validation_prefixes={name: str(folder / shard.prefix) for name, shard in manifest.validation.items()},
        validation_tokens={name: shard.tokens for name, shard in manifest.validation.items()},
        shards={str(folder / shard.prefix): shard for shard in shards},
        weights={name: source.weight for name, source in manifest.sources.items()},
        vocab_size=manifest.tokenizer.vocab_size,
        eos_id=manifest.tokenizer.eos_id,
        tokenizer_fingerprint=manifest.tokenizer.fingerprint,
        tokenizer_folder=tokenizer_folder,
        plan_fingerprint=manifest.plan_fingerprint,
    )
