"""A blend of random tokens, for measurements of speed: in the layout of data_prep/blend.py, but without any text.

No tokenizer made these tokens, so nothing that needs text can use them.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_prep.blended_data import (
    BLEND_FILE,
    BLEND_FORMAT_VERSION,
    TOKENIZER_FOLDER,
    BlendedShard,
    BlendedSource,
    BlendManifest,
    BlendTokenizer,
    TrainShards,
)
from data_prep.blending.blended_shard import BlendedShardWriter
from data_prep.indexed_shards import token_dtype
from data_prep.output_files import folder_written_whole, write_sealed_json

DOCUMENT_TOKENS = 1000
SOURCE = "random"
NO_TOKENIZER = "none: random tokens"


def write_synthetic_blend(
    folder: Path, vocab_size: int, train_tokens: int, validation_tokens: int, seed: int = 0
) -> None:
    """Write one train shard and one validation shard of uniformly drawn tokens; replaces `folder`.

    Args:
        folder: the blend's folder.
        vocab_size: tokens are 0 to vocab_size - 1; the last one ends each document.
        train_tokens: rounded up to whole documents.
        validation_tokens: likewise.
        seed: of the tokens.
    """
    generator = np.random.default_rng(seed)
    with folder_written_whole(folder) as partial:
        train = _write_shard(partial, "train/shard_00000", vocab_size, train_tokens, generator)
        validation = _write_shard(partial, f"validation/{SOURCE}", vocab_size, validation_tokens, generator)
        (partial / TOKENIZER_FOLDER).mkdir()
        source = BlendedSource(
            weight=1.0,
            tokens_available=train.tokens,
            tokens_wanted=train.tokens,
            tokens_realised=train.tokens,
            documents=train.documents,
            epochs=1.0,
        )
        manifest = BlendManifest(
            format_version=BLEND_FORMAT_VERSION,
            seed=seed,
            plan_fingerprint=f"random tokens, seed {seed}: {train.bin_xxh3_128}",
            tokenizer=BlendTokenizer(
                fingerprint=NO_TOKENIZER, vocab_size=vocab_size, eos_id=vocab_size - 1, path="", files={}
            ),
            sources={SOURCE: source},
            train=TrainShards(shards=[train]),
            validation={SOURCE: validation},
            left_out={},
        )
        write_sealed_json(partial / BLEND_FILE, asdict(manifest))


def _write_shard(
    folder: Path, prefix: str, vocab_size: int, tokens: int, generator: np.random.Generator
) -> BlendedShard:
    documents = -(-tokens // DOCUMENT_TOKENS)
    dtype = token_dtype(vocab_size)
    drawn = generator.integers(0, vocab_size - 1, (documents, DOCUMENT_TOKENS)).astype(dtype)
    drawn[:, -1] = vocab_size - 1
    with BlendedShardWriter(folder, prefix, dtype) as writer:
        writer.add_documents(drawn.reshape(-1), np.full(documents, DOCUMENT_TOKENS, np.int32))
        return writer.publish()
