"""Batches from blended shards, through Megatron's own datasets.

The sample order is a pure function of the seed and the shards: sample i of the run is the same for every layout of
ranks, and a resumed run continues at the number of samples consumed so far.
"""

from collections.abc import Iterator

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import DataLoader, Dataset

from data_prep.blended_data import BlendedData
from pretrain.config import RunConfig
from pretrain.parallel import ParallelContext
from pretrain.stages.contract import Batch


class ShardVocabulary:
    """What Megatron's datasets ask a tokenizer for; the shards hold token ids already."""

    def __init__(self, blend: BlendedData) -> None:
        self.vocab_size = blend.vocab_size
        self.eod = blend.eos_id
        self.pad = -1  # no such token: nothing in the shards is padding
        self.unique_identifiers = {"fingerprint": blend.tokenizer_fingerprint}


class IndexedSamples(Dataset[dict[str, torch.Tensor]]):
    """A Megatron dataset whose samples also say which one they are, for their action noise."""

    def __init__(self, samples: Dataset[dict[str, torch.Tensor]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[index]
        return {"tokens": sample["tokens"], "labels": sample["labels"], "sample_index": torch.tensor(index)}


def find_data_problems(config: RunConfig, blend: BlendedData) -> list[str]:
    """What keeps the shards in `blend` from serving `config`, each with its remedy."""
    length = config.data.sequence_length
    problems = []
    if blend.vocab_size > config.model.vocab_size:
        problems.append(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the {blend.vocab_size} tokens of the "
            f"tokenizer that made {blend.folder}; enlarge the model or blend with another tokenizer"
        )
    too_short = [name for name, tokens in blend.validation_tokens.items() if tokens <= length]
    if max(blend.train_tokens) <= length:
        problems.append(
            f"data.sequence_length: {length} tokens is more than a shard of {blend.folder} holds "
            f"({max(blend.train_tokens):,}); shorten it or blend larger shards"
        )
    elif too_short:
        problems.append(
            f"data.sequence_length: {length} tokens is more than the validation shards of {', '.join(too_short)} "
            f"in {blend.folder} hold; shorten it or blend with more validation_tokens"
        )
    else:
        needed = config.training.steps * config.training.global_batch_size
        available = sum((tokens - 1) // length for tokens in blend.train_tokens)
        if needed > available:
            problems.append(
                f"training.steps: {config.training.steps} steps need {needed:,} samples of {length} tokens, "
                f"{blend.folder} holds {available:,}; blend more tokens or train fewer steps"
            )
    return problems


def build_datasets(config: RunConfig, blend: BlendedData) -> tuple[IndexedSamples, IndexedSamples]:
    """Train and validation samples of `data.sequence_length` tokens. Collective: every rank calls it."""
    sources = sorted(blend.validation_prefixes)
    dataset_config = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.data.sequence_length,
        blend_per_split=[
            (list(blend.train_prefixes), None),
            (
                [blend.validation_prefixes[source] for source in sources],
                [blend.weights[source] for source in sources],
            ),
            None,
        ],
        path_to_cache=str(config.run_folder / "index_cache"),
        tokenizer=ShardVocabulary(blend),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # One epoch of everything whatever the run's length, so that a longer run keeps the order of a shorter one.
    sizes = [None, config.validation.steps * config.training.global_batch_size, None]
    train, validation, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, sizes, lambda: True, dataset_config
    ).build()
    return IndexedSamples(train), IndexedSamples(validation)


def micro_batches(
    samples: IndexedSamples, config: RunConfig, context: ParallelContext, first_step: int, last_step: int
) -> Iterator[Batch]:
    """This rank's micro-batches of the steps after `first_step` up to `last_step`, in training order."""
    loader = DataLoader(
        samples,
        batch_sampler=_index_lists(config, context, first_step, last_step),  # type: ignore[arg-type]
        num_workers=config.data.loader_workers,
        pin_memory=context.device.type == "cuda",
    )
    for sample in loader:
        yield Batch(
            *(sample[k].to(context.device, non_blocking=True) for k in ("tokens", "labels", "sample_index"))
        )


def _index_lists(config: RunConfig, context: ParallelContext, first_step: int, last_step: int) -> list[range]:
    """Sample indices of each micro-batch: a global batch is cut into micro-steps, each micro-step into ranks."""
    size = config.training.micro_batch_size
    micro_step = size * context.data_parallel_size
    start = first_step * config.training.global_batch_size + context.data_parallel_rank * size
    stop = last_step * config.training.global_batch_size
    return [range(index, index + size) for index in range(start, stop, micro_step)]
