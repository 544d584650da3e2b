"""Stream a data set of the Hugging Face Hub, or a local folder that `datasets` can load, shard by shard.

An address is `hub:owner/name` or `hub:owner/name:configuration`. `datasets` does the reading: it knows every
format on the Hub. A shard of the data set is a unit of work; its name is its number.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.corpus_sources import HUB_PREFIX, SPLITS, CorpusFile, SourceFormat
from data_prep.errors import InputDataError, UserError
from data_prep.readers.row_batch import RowBatch, RowErrors

if TYPE_CHECKING:
    from datasets import IterableDataset

BATCH_ROWS = 256


def find_hub_shards(address: str) -> list[CorpusFile]:
    """List the shards of a data set's train and validation splits.

    Raises:
        UserError: the data set cannot be opened, or has no train split.
    """
    import datasets

    name, configuration = _parse(address)
    try:
        found = datasets.get_dataset_split_names(name, configuration)
        splits = [split for split in SPLITS if split in found]
        shard_counts = {split: _open(address, split).num_shards for split in splits}
    except Exception as error:  # the library raises whatever its readers and the network raise
        raise UserError(f"--input {address} cannot be opened ({_one_line(error)}); check its name") from error
    if "train" not in splits:
        raise UserError(f"--input {address} has no train split, only {', '.join(found)}")
    return [
        CorpusFile(
            path=Path(address),
            relative_path=f"{split}/{number}",
            unit=f"{number:05d}-of-{count:05d}",
            split=split if len(splits) > 1 else None,
            size_bytes=0,
        )
        for split, count in shard_counts.items()
        for number in range(count)
    ]


def read_hub_shard(file: CorpusFile, source: SourceFormat, errors: RowErrors) -> Iterator[RowBatch]:
    """Stream the texts of one shard.

    Raises:
        InputDataError: the shard cannot be read, or a row has no text.
    """
    split, number = file.relative_path.split("/")
    row_number = 0
    try:
        whole = _open(str(file.path), split)
        shard = whole.shard(num_shards=whole.num_shards, index=int(number))
        for rows in shard.iter(batch_size=BATCH_ROWS):
            batch = RowBatch()
            size = len(next(iter(rows.values())))
            for text in rows.get(source.text_field, [None] * size):
                row_number += 1
                if isinstance(text, str):
                    batch.add(text)
                else:
                    errors.add(row_number, f"has no text under {source.text_field!r} (see --text-field)")
            yield batch
    except InputDataError:
        raise
    except Exception as error:  # as above
        raise InputDataError(f"{file.path}: {file.relative_path}: {_one_line(error)}; try again") from error
    yield RowBatch(progress=1.0)


def _parse(address: str) -> tuple[str, str | None]:
    name, _, configuration = address.removeprefix(HUB_PREFIX).partition(":")
    return name, configuration or None


def _open(address: str, split: str) -> "IterableDataset":
    import datasets

    name, configuration = _parse(address)
    return datasets.load_dataset(name, configuration, split=split, streaming=True)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
