"""Stream the texts of one input file, whatever its format."""

from collections.abc import Iterator

from data_prep.corpus_sources import HUB_PREFIX, CorpusFile, SourceFormat
from data_prep.errors import InputDataError
from data_prep.readers.hub import read_hub_shard
from data_prep.readers.json_array import read_json_array
from data_prep.readers.jsonl import read_jsonl
from data_prep.readers.parquet import read_parquet
from data_prep.readers.row_batch import RowBatch, RowErrors


def read_batches(
    file: CorpusFile, source: SourceFormat, errors: RowErrors | None = None
) -> Iterator[RowBatch]:
    """Stream a file's texts in batches.

    Args:
        file: the file.
        source: how its source is published.
        errors: what happens at a bad row; None stops at the first.

    Raises:
        InputDataError: names the file, and the row, that is not in the format.
    """
    errors = errors or RowErrors(file.path, max_skipped=0)
    if str(file.path).startswith(HUB_PREFIX):
        yield from read_hub_shard(file, source, errors)
        return
    if file.path.stat().st_size == 0:
        raise InputDataError(f"{file.path}: is empty (0 bytes); fetch the file again")
    match file.path.suffix:
        case ".parquet":
            folder = file.relative_path.split("/")[0]
            yield from read_parquet(file.path, source, folder in source.folders_of_other_columns)
        case ".json":
            yield from read_json_array(file.path, source, errors)
        case _:
            yield from read_jsonl(file.path, source, errors)
