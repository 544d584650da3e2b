"""A finished demo in miniature: random exported model, tokenizer, blend, metrics and held-out figures.

The vocabulary has Chinese words, since those must reach the page and stay out of the figures.
"""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast

from data_prep.blended_data import (
    BLEND_FORMAT_VERSION,
    BlendedSource,
    BlendManifest,
    BlendTokenizer,
    TrainShards,
)
from data_prep.blending.blended_shard import BlendedShardWriter
from data_prep.indexed_shards import token_dtype
from data_prep.output_files import write_sealed_json
from data_prep.text_tokenizer import load_tokenizer
from tests.checkpoint_tools.random_cola import random_cola

CHINESE_WORDS = ["中文", "行动", "模型", "语言"]
WORDS = [*CHINESE_WORDS, *(f" word{number}" for number in range(90)), "\n", "\t", "<b>"]
EOS_ID = 1
NUM_ACTIONS = 16
WEIGHTS = {"slimpajama": 0.5, "starcoder": 0.3, "wudao": 0.2}
BLOCK_TOKENS = 16
DOCUMENT_TOKENS = 40
DOCUMENTS = 30
STEPS = (10, 20, 30, 40)


def write_demo(folder: Path) -> Path:
    """Everything that the report needs but held_out.json; returns the folder."""
    write_model(folder / "hf")
    write_blend(folder / "data", folder / "hf")
    for stage in ("base", "idm", "policy"):
        write_metrics(folder / stage / "metrics.jsonl", stage)
    return folder


def write_model(folder: Path) -> None:
    """A random CoLA model and its tokenizer, as an export has them."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "</s>", *WORDS])}
    model = random_cola(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_actions=NUM_ACTIONS,
        output_form="residual",
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=EOS_ID, pad_token_id=EOS_ID)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.decoder = Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(
        folder
    )


def write_blend(folder: Path, tokenizer_folder: Path) -> None:
    """Validation shards of three sources, and no train shard."""
    tokenizer = load_tokenizer(tokenizer_folder)
    generator = np.random.default_rng(0)
    validation = {}
    for source in WEIGHTS:
        dtype = token_dtype(tokenizer.vocab_size)
        with BlendedShardWriter(folder, f"validation/{source}", dtype) as writer:
            for _ in range(DOCUMENTS):
                document = generator.integers(2, tokenizer.vocab_size, DOCUMENT_TOKENS)
                writer.add(np.append(document, EOS_ID).astype(dtype))
            validation[source] = writer.publish()
    manifest = BlendManifest(
        format_version=BLEND_FORMAT_VERSION,
        seed=0,
        plan_fingerprint="",
        tokenizer=BlendTokenizer(
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=EOS_ID,
            path="",
            files={},
        ),
        sources={
            source: BlendedSource(
                weight=weight, tokens_available=1, tokens_wanted=1, tokens_realised=1, documents=1, epochs=1.0
            )
            for source, weight in WEIGHTS.items()
        },
        train=TrainShards(shards=[]),
        validation=validation,
        left_out={},
    )
    shutil.copytree(tokenizer_folder, folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    write_sealed_json(folder / "blend.json", asdict(manifest))


def write_metrics(path: Path, stage: str) -> None:
    """A short training run; the speed of step 10, which is start-up, is far off the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in STEPS:
        for split in ("train", "validation"):
            line: dict[str, object] = {
                "step": step,
                "stage": stage,
                "split": split,
                "consumed_tokens": step * 2048,
                "elapsed_seconds": step / 10,
                "loss": 4 + math.exp(-step / 20),
            }
            if stage == "idm":
                line |= {
                    "prediction_loss": 2 + math.exp(-step / 20),
                    "alive_actions": NUM_ACTIONS,
                    "action_perplexity": NUM_ACTIONS - 1.5,
                    "action_fractions": [1 / NUM_ACTIONS] * NUM_ACTIONS,
                }
            if stage == "policy":
                line["action_accuracy"] = 0.1 + step / 200
            if split == "train":
                line["tokens_per_second"] = 1000.0 + step
            lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
