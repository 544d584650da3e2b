"""One real optimizer step, and what it leaves in memory. Run as a program it prints how far memory has grown, bytes.

python one_step.py PRECISION
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import gc
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

from pretrain import cpu_redirects

cpu_redirects.apply()

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel
from pretrain.optimization import build_optimizer, wrap_for_data_parallel
from pretrain.parallel import ParallelContext, parallel_context
from pretrain.stages.contract import Batch, StageLoss
from pretrain.stages.registry import stage_class
from tests.pretrain.tiny_runs import tiny_recipe

# 14 M parameters in the base and 12 M trained: 240 MB in fp32. Few tokens, so that this is nearly all there is.
LARGE_MODEL = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "ffn_hidden_size": 1152,
    "num_layers": 4,
    "num_attention_heads": 6,
    "head_size": 64,
}
LARGE_ACTIONS = {"num_idm_layers": 4}


def large_recipe(precision: str) -> RunConfig:
    """An IDM run of hundreds of megabytes."""
    return tiny_recipe(
        "idm",
        Path("run"),
        Path("data"),
        Path("start"),
        model=LARGE_MODEL,
        actions=LARGE_ACTIONS,
        training={"precision": precision, "micro_batch_size": 1, "global_batch_size": 1},
    )


def train_one_step(
    config: RunConfig, context: ParallelContext
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """Model and optimizer after a step on random tokens."""
    stage = stage_class(config)
    model = ColaModel(config, context.groups, (*stage.frozen_parts, *stage.trained_parts))
    model.freeze_all_but(stage.trained_parts)
    ddp = wrap_for_data_parallel(model, context)
    optimizer = build_optimizer(config, ddp)
    size, length = config.training.micro_batch_size, config.data.sequence_length
    tokens_BS, labels_BS = torch.randint(config.model.vocab_size, (2, size, length))
    result = ddp(stage(config, context.data_parallel_mean), Batch(tokens_BS, labels_BS, torch.arange(size)))
    assert isinstance(result, StageLoss)
    result.loss.backward()
    ddp.finish_grad_sync()
    succeeded, _, _ = optimizer.step()
    assert succeeded
    return ddp, optimizer


def live_storages() -> dict[int, int]:
    """Bytes of every tensor storage that is alive, by address."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return storage_bytes([*tensors, *(t.grad for t in tensors if t.is_leaf and t.grad is not None)])


def storage_bytes(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of the tensors' storages, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def resident_bytes() -> int:
    """Resident memory of this process now; Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Most resident memory of this program; ru_maxrss would begin with that of the process it was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def main() -> None:
    """Warm up on a tiny run, so that libraries are loaded, then measure a large one."""
    with parallel_context(tensor_parallel_size=1, seed=0) as context:
        precision = {"precision": sys.argv[1]}
        tiny = tiny_recipe("idm", Path("run"), Path("data"), Path("start"), training=precision)
        train_one_step(tiny, context)
        gc.collect()
        before = resident_bytes()
        train_one_step(large_recipe(sys.argv[1]), context)
        print(peak_bytes() - before)


if __name__ == "__main__":
    main()
