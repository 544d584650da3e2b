"""Batches from blended shards, through Megatron's own datasets.

The sample order is a pure function of the seed and the shards: sample i of the run is the same for every layout of
ranks, and a resumed run continues at the number of samples consumed so far.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from torch.utils.data import DataLoader, Dataset

from data_prep.blended_data import BlendedData
from data_prep.errors import UserError
from pretrain.checked_shards import CheckedSamples, CheckedSamplesConfig, check_indexes
from pretrain.config import RunConfig
from pretrain.faults.stop_request import leave_signals_to_the_rank
from pretrain.index_cache import whole_index_cache
from pretrain.parallel import ParallelContext
from pretrain.stages.contract import Batch


class ShardVocabulary:
    """What Megatron's datasets ask a tokenizer for; the shards hold token ids already."""

    def __init__(self, blend: BlendedData) -> None:
        self.vocab_size = blend.vocab_size
        self.eod = blend.eos_id
        self.pad = -1  # no such token: nothing in the shards is padding
        # Megatron's name for the order of the samples depends on these, else only on the shards' paths.
        self.unique_identifiers = {
            "fingerprint": blend.tokenizer_fingerprint,
            "data_fingerprint": blend.plan_fingerprint,
        }


class IndexedSamples(Dataset[dict[str, torch.Tensor]]):
    """A Megatron dataset whose samples also say which one they are, for their action noise."""

    def __init__(self, samples: Dataset[dict[str, torch.Tensor]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # A run that was rolled back reads more samples than it has steps for: after the last comes the first.
        sample = self.samples[index % len(self)]
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
    """Train and validation samples of `data.sequence_length` tokens. Collective: every rank calls it.

    Raises (also when a sample is read):
        InputDataError: a part of a shard is not what was written.
        StorageError: the order of the samples could not be written to the run folder.
    """
    check_indexes(blend.shards, dist.get_rank(), dist.get_world_size())
    sources = sorted(blend.validation_prefixes)
    cache = config.run_folder / "index_cache"
    dataset_config = CheckedSamplesConfig(
        shards=blend.shards,
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
        path_to_cache=str(cache),
        tokenizer=ShardVocabulary(blend),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # One epoch of everything whatever the run's length, so that a longer run keeps the order of a shorter one.
    sizes = [None, config.validation.steps * config.training.global_batch_size, None]
    with whole_index_cache(cache):
        train, validation, _ = BlendedMegatronDatasetBuilder(
            CheckedSamples, sizes, lambda: True, dataset_config
        ).build()
    return IndexedSamples(train), IndexedSamples(validation)


def micro_batches(
    samples: IndexedSamples, config: RunConfig, context: ParallelContext, first_sample: int, steps: int
) -> Iterator[Batch]:
    """This rank's micro-batches of `steps` steps that begin with sample `first_sample`, in training order.

    Raises:
        InputDataError: a part of a shard is not what was written.
    """
    loader = DataLoader(
        samples,
        batch_sampler=_index_lists(config, context, first_sample, steps),  # type: ignore[arg-type]
        num_workers=config.data.loader_workers,
        # A loader process that dies of a signal takes its rank along, unsaved.
        worker_init_fn=leave_signals_to_the_rank,
        pin_memory=context.device.type == "cuda",
    )
    for sample in _with_plain_errors(loader):
        yield Batch(
            *(sample[k].to(context.device, non_blocking=True) for k in ("tokens", "labels", "sample_index"))
        )


def _with_plain_errors(
    loader: DataLoader[dict[str, torch.Tensor]],
) -> Iterator[dict[str, torch.Tensor]]:
    """What a loader yields; an error of a loader process, whose message torch makes a traceback, gets it back."""
    try:
        yield from loader
    except UserError as error:
        if loader.num_workers == 0:
            raise
        raise type(error)(str(error).splitlines()[-1].partition(": ")[2]) from error


def _index_lists(config: RunConfig, context: ParallelContext, first_sample: int, steps: int) -> list[range]:
    """Sample indices of each micro-batch: a global batch is cut into micro-steps, each micro-step into ranks."""
    size = config.training.micro_batch_size
    start = first_sample + context.data_parallel_rank * size
    stop = first_sample + steps * config.training.global_batch_size
    return [range(index, index + size) for index in range(start, stop, size * context.data_parallel_size)]
