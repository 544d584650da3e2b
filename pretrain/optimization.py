"""Megatron's DDP, distributed AdamW and learning-rate schedule for the trained parts."""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import MegatronOptimizer, ParamKey, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.utils import get_model_config

from pretrain.config import RunConfig
from pretrain.cpu_redirects import training_device
from pretrain.faults.bad_steps import BadStepError
from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext

# As in the released code: weight decay on everything trained except the codebook.
NO_WEIGHT_DECAY = "*codebook*"
_NO_TENSOR_HERE = "no trained tensor on this rank"


class ReleasableDataParallel(DistributedDataParallel):
    """Megatron's DDP, which is freed when nobody needs it any more.

    Megatron's hooks hold the wrapper from within torch's C++, where Python's garbage collector does not see the cycle:
    model, gradient buffers and process groups, with all their threads, would stay for as long as the process.
    """

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        wrapper, parameter = weakref.ref(self), weakref.ref(param)

        def hook(*unused: object) -> None:
            DistributedDataParallel._make_backward_post_hook(wrapper(), parameter())(*unused)

        return hook


def wrap_for_data_parallel(model: ColaModel, context: ParallelContext) -> DistributedDataParallel:
    """Gradient buffers and reduction for the tensors that require gradients; frozen ones stay outside.

    With more than one data-parallel rank, gradients are reduced while the backward pass goes on, and parameters are
    gathered from the start of the next step on (`DistributedDataParallel.start_param_sync`), all buckets at once.
    """
    overlap = context.data_parallel_size > 1
    return ReleasableDataParallel(
        config=get_model_config(model),
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            align_param_gather=overlap,
        ),
        module=model,
    )


def build_optimizer(config: RunConfig, ddp: DistributedDataParallel) -> MegatronOptimizer:
    """AdamW with fp32 master weights, sharded over the data-parallel ranks."""
    settings = config.optimizer
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.clip_gradient_norm,
        bf16=config.training.precision == "bf16",
        params_dtype=get_model_config(ddp).params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=ddp.ddp_config.overlap_param_gather,
    )
    # An explicit map also switches off Megatron's default of no decay on norms and other vectors.
    overrides = {ParamKey(name=NO_WEIGHT_DECAY): ParamGroupOverride(wd_mult=0.0)}
    optimizer = get_megatron_optimizer(megatron_config, [ddp], config_overrides=overrides)
    for distributed in _with_torch_adamw(optimizer):
        for group in distributed.optimizer.param_groups:
            group["fused"] = True
    return optimizer


def _distributed_optimizers(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _with_torch_adamw(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers inside whose AdamW is torch's, neither Transformer Engine's nor apex's."""
    inside = _distributed_optimizers(optimizer)
    return [distributed for distributed in inside if isinstance(distributed.optimizer, torch.optim.AdamW)]


def refuse_non_finite_gradients(optimizer: MegatronOptimizer) -> None:
    """Make `optimizer.step` raise `BadStepError`, on all ranks alike, before it moves on such gradients.

    Megatron looks at the gradient norm only where it scales the loss; here the norm itself refuses.
    """
    gradient_norm = optimizer.get_grad_norm

    def finite_gradient_norm() -> float:
        norm = gradient_norm()
        if norm is None or not math.isfinite(norm):
            raise BadStepError(f"gradient norm {norm}")
        return norm

    optimizer.get_grad_norm = finite_gradient_norm


def build_scheduler(
    config: RunConfig, optimizer: MegatronOptimizer, steps_done: int
) -> OptimizerParamScheduler:
    """Linear warm-up and cosine decay, counted in optimizer steps, standing at `steps_done`.

    The schedule is a pure function of the step, so it needs no place in a checkpoint. Step it before the optimizer:
    the first optimizer step then has 1/warmup of the peak rate, not zero.
    """
    settings = config.optimizer
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=settings.decay_steps,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    scheduler.step(increment=steps_done)
    return scheduler


def make_savable(optimizer: MegatronOptimizer) -> None:
    """Let ranks without any trained tensor take part in a save. Collective.

    Megatron 0.16.1 reads the step from torch's AdamW's state, which such ranks do not have (the first pipeline stages
    of a frozen base, or a data-parallel rank whose share is empty), and saves rank 0's.
    """
    for distributed in _with_torch_adamw(optimizer):
        adamw = distributed.optimizer
        own = [float(state["step"]) for key, state in adamw.state.items() if torch.is_tensor(key)]
        step = torch.tensor(max(own, default=0.0), device=training_device())
        dist.all_reduce(step, op=dist.ReduceOp.MAX)
        if not own:
            adamw.state[_NO_TENSOR_HERE] = {"step": step}


@contextmanager
def own_settings(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Load a checkpoint's state without its settings: those are the recipe's, and of this machine's kind of AdamW.

    Transformer Engine's and torch's have different ones, and each fails without its own. Only the step is state; one
    counts it as an integer, the other as a number with a point.
    """
    inside = [distributed.optimizer for distributed in _distributed_optimizers(optimizer)]
    before = [[dict(group) for group in adamw.param_groups] for adamw in inside]
    yield
    for adamw, groups in zip(inside, before, strict=True):
        for group, own in zip(adamw.param_groups, groups, strict=True):
            step = {"step": int(group["step"])} if "step" in group else {}
            group |= {name: value for name, value in own.items() if name != "params"} | step


def make_loadable(optimizer: MegatronOptimizer) -> None:
    """Let a fresh optimizer load a checkpoint where the inner one is torch's AdamW (no Transformer Engine or apex).

    Megatron 0.16.1 then asks for the step before there is any state, does not expect torch's step entry among the
    tensors it restores, and gives all parameters one step tensor, which AdamW counts up once for each of them.
    """
    for distributed in _with_torch_adamw(optimizer):
        adamw = distributed.optimizer
        for parameter in (p for group in adamw.param_groups for p in group["params"]):
            zeros = torch.zeros_like(parameter)
            adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),  # where fused AdamW wants it
                "exp_avg": zeros,
                "exp_avg_sq": zeros.clone(),
            }
        if not adamw.state:
            adamw.state[_NO_TENSOR_HERE] = {"step": torch.zeros(())}
        distributed._set_main_param_and_optimizer_states = partial(_restore_all_but_step, distributed)


def _restore_all_but_step(
    distributed: DistributedOptimizer, parameter: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> None:
    group, index = distributed.model_param_group_index_map[parameter]
    state = distributed.optimizer.state[distributed.optimizer.param_groups[group]["params"][index]]
    step = state.pop("step")
    DistributedOptimizer._set_main_param_and_optimizer_states(distributed, parameter, tensors)
    state["step"] = step.clone()
