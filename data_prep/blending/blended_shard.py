"""Write one shard of a blend: Megatron's pair of files, and the checksums of the blocks of its .bin."""

from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np

from data_prep.blended_data import BlendedShard
from data_prep.block_checksums import BlockChecksums, blocks_path
from data_prep.indexed_shards import ShardWriter
from data_prep.output_files import partial_path, publish_file


class BlendedShardWriter(ShardWriter):
    """Writes `<prefix>.bin`, `.idx` and `.xxh` under a blend's folder; all finished, or nothing."""

    def __init__(self, folder: Path, prefix: str, dtype: np.dtype) -> None:
        super().__init__(folder / prefix, dtype)
        self._name = prefix
        self._blocks = BlockChecksums()
        self._blocks_path = blocks_path(folder / prefix)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        partial_path(self._blocks_path).unlink(missing_ok=True)

    def _take_checksums(self, data: memoryview) -> None:
        super()._take_checksums(data)
        self._blocks.add(data)

    def publish(self) -> BlendedShard:
        """Make the three files durable, give them their names and say what they hold."""
        blocks_xxh3_128 = self._blocks.write(partial_path(self._blocks_path))
        summary = super().publish()
        publish_file(self._blocks_path)
        return BlendedShard(prefix=self._name, blocks_xxh3_128=blocks_xxh3_128, **asdict(summary))
