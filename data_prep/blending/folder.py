"""The folder of a blend: what must not be there at the start, and the list of everything at the end.

Several processes may work in one folder, each on its own shards. Whichever finds at its end that nothing is
missing writes blend.json; where two find it at once they write the same bytes.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data_prep.blended_data import (
    BLEND_FILE,
    BLEND_FORMAT_VERSION,
    TOKENIZER_FOLDER,
    BlendedSource,
    BlendManifest,
    BlendTokenizer,
    TrainShards,
)
from data_prep.blending.plan import BlendPlan
from data_prep.blending.writer import BlendWriter, ShardRecord
from data_prep.corpus_sources import SPLITS
from data_prep.errors import UserError
from data_prep.indexed_shards import manifest_path
from data_prep.output_files import PARTIAL_SUFFIX, file_checksum, partial_path, write_shared_json
from data_prep.text_tokenizer import TextTokenizer, copy_tokenizer
from data_prep.unit_manifest import UNITS_FILE, sum_counts

SHARD_SUFFIXES = (".bin", ".idx", ".xxh", ".json", PARTIAL_SUFFIX)


def remove_blend(folder: Path) -> None:
    """Delete an earlier blend, its list first, and nothing that is not a blend's.

    Raises:
        UserError: the folder is a tokenized corpus, whose files have the same names.
    """
    if (folder / UNITS_FILE).exists():
        raise UserError(f"--output {folder} is a tokenized corpus, so --overwrite will not delete it")
    (folder / BLEND_FILE).unlink(missing_ok=True)
    for split in SPLITS:
        for path in (folder / split).glob("*"):
            if path.suffix in SHARD_SUFFIXES:
                path.unlink()
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)


def refuse_other_shards(folder: Path, plan: BlendPlan) -> None:
    """Raise UserError when the folder holds a shard that the plan does not have."""
    expected = {manifest_path(folder / prefix) for prefix in all_prefixes(plan)}
    for split in SPLITS:
        for path in sorted((folder / split).glob("*.json")):
            if path not in expected:
                raise UserError(
                    f"{path}: was written from other settings or sources; pass --overwrite to blend anew"
                )


def all_prefixes(plan: BlendPlan) -> list[str]:
    """All shards of a blend, those of validation first."""
    return prefixes_of_task(plan, range(plan.shard_count))


def prefixes_of_task(plan: BlendPlan, shards: Sequence[int]) -> list[str]:
    """The shards that a process writes whose train shards are `shards`: with the first goes validation."""
    validation = [plan.validation_prefix(source) for source in plan.validation] if 0 in shards else []
    return validation + [plan.train_prefix(shard) for shard in shards]


def copy_tokenizer_whole(tokenizer: Path, folder: Path) -> None:
    """Copy the tokenizer into a blend's folder, unless the same files are there."""
    target = folder / TOKENIZER_FOLDER
    copy = partial_path(target)
    shutil.rmtree(copy, ignore_errors=True)
    copy_tokenizer(tokenizer, copy)
    if target.is_dir() and checksums(target) == checksums(copy):
        shutil.rmtree(copy)
        return
    shutil.rmtree(target, ignore_errors=True)
    copy.rename(target)


def checksums(folder: Path) -> dict[str, str]:
    """Checksum of every file of a folder, by name."""
    return {path.name: file_checksum(path) for path in sorted(folder.iterdir()) if path.is_file()}


def missing_parts(folder: Path, plan: BlendPlan, writer: BlendWriter) -> list[str]:
    """What is not finished: prefixes of shards, and the tokenizer's folder."""
    missing = writer.missing(all_prefixes(plan))
    return missing if (folder / TOKENIZER_FOLDER).is_dir() else [TOKENIZER_FOLDER, *missing]


def list_blend(
    folder: Path, plan: BlendPlan, writer: BlendWriter, tokenizer: TextTokenizer, tokenizer_path: Path
) -> BlendManifest:
    """Write blend.json over finished shards, and remove what killed processes left half-written."""
    blend_tokenizer = BlendTokenizer(
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        path=str(tokenizer_path),
        files=checksums(folder / TOKENIZER_FOLDER),
    )
    manifest = make_manifest(
        plan,
        blend_tokenizer,
        train=[_record(writer, plan.train_prefix(shard)) for shard in range(plan.shard_count)],
        validation={name: _record(writer, plan.validation_prefix(name)) for name in plan.validation},
    )
    write_shared_json(folder / BLEND_FILE, asdict(manifest))
    _remove_partial(folder)
    return manifest


def make_manifest(
    plan: BlendPlan,
    tokenizer: BlendTokenizer,
    *,
    train: list[ShardRecord],
    validation: dict[str, ShardRecord],
) -> BlendManifest:
    """Sum up what was written."""
    documents: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for record in train:
        documents.update(record.source_documents)
        tokens.update(record.source_tokens)
    sources = {
        name: BlendedSource(
            weight=source.weight,
            tokens_available=source.split.tokens,
            tokens_wanted=source.tokens_wanted,
            tokens_realised=tokens[name],
            documents=documents[name],
            epochs=tokens[name] / source.split.tokens,
        )
        for name, source in plan.train.items()
    }
    return BlendManifest(
        format_version=BLEND_FORMAT_VERSION,
        seed=plan.seed,
        plan_fingerprint=plan.fingerprint,
        tokenizer=tokenizer,
        sources=sources,
        train=TrainShards(shards=[record.shard for record in train]),
        validation={name: record.shard for name, record in validation.items()},
        left_out=sum_counts(record.left_out for record in train),
    )


def _record(writer: BlendWriter, prefix: str) -> ShardRecord:
    record = writer.finished(prefix)
    if record is None:
        raise UserError(f"{prefix} was finished and is not any more; run again with --resume")
    return record


def _remove_partial(folder: Path) -> None:
    for place in (folder, *(folder / split for split in SPLITS)):
        for path in place.glob(f"*{PARTIAL_SUFFIX}"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
