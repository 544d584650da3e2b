"""The one module that knows that Megatron-core expects CUDA.

Importing `megatron.core` on a machine without a GPU works; running it does not, because device names are written
literally in its schedules, optimizer and checkpoint writer. `apply()` points those places at the CPU and hides
Transformer Engine and NVIDIA's apex (their kernels are CUDA only, yet Megatron chooses them where they import). It does
nothing where CUDA is present, so one code path serves a laptop and a cluster. Call it before the first Megatron import.
"""

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo
from torch.utils._device import _device_constructors

from pretrain.backends import find_apex

_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # of malloc.h
_applied = False


def on_cuda() -> bool:
    """True where training runs on CUDA devices."""
    return torch.cuda.is_available()


def training_device() -> torch.device:
    """The device of this process: its current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda() else torch.device("cpu")


def weight_device() -> torch.device | None:
    """Where new weights are made: this process's CUDA device, else wherever torch makes tensors by default."""
    return training_device() if on_cuda() else None


def prepare_conversion() -> None:
    """For a command that works through a model on disk to call first, since it needs no GPU, nor memory for one.

    Where there are GPUs, it starts the program again without.
    """
    if on_cuda():
        os.execve(
            sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        )
    _keep_freed_memory(of_any_size=True)  # one large tensor follows another


def apply() -> None:
    """Redirect Megatron's CUDA assumptions to the CPU. Idempotent; a no-op where CUDA is present."""
    global _applied
    if _applied or on_cuda():
        return
    _applied = True
    warnings.filterwarnings("ignore", module="megatron")  # advice about CUDA libraries that cannot help here
    _keep_freed_memory()
    _hide_gpu_only_packages()
    _import_megatron_lightly()
    _redirect_device_queries()
    _redirect_random_state()
    # `with torch.device("meta")` (transformers loads models so) recognises factories by a set it makes on first use;
    # it must be made of the originals, which is what the wrappers call.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _without_cuda_device(getattr(torch, name)))
    _redirect_tensor_methods()
    _redirect_megatron_random()
    _speed_up_products()
    _shorten_rotation()
    _skip_lone_collectives()
    _share_sockets_loop()


def _keep_freed_memory(of_any_size: bool = False) -> None:
    """Use freed memory again instead of returning it to the system: new pages are 5 % of a step. glibc only.

    Blocks of 32 MiB and more only where `of_any_size`, since between the small ones they leave gaps.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return
    options = {_M_TRIM_THRESHOLD: 2**31 - 1, _M_MMAP_THRESHOLD: 2**25}
    if of_any_size:
        options |= {_M_MMAP_MAX: 0, _M_ARENA_MAX: 1}
    for option, value in options.items():
        mallopt(option, value)


def return_freed_memory() -> None:
    """Give back to the system what was freed so far: between a model's weights it leaves gaps. glibc only."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it has none of that name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None


def _hide_gpu_only_packages() -> None:
    """Have imports fail, but of what is imported already. A foreign apex stays, to be found and refused."""
    names = ["transformer_engine"]
    if find_apex()[0] in ("nvidia", "incomplete"):
        names += ["apex", "amp_C"]
    for name in names:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _redirect_device_queries() -> None:
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.device_count = lambda: 1


def _redirect_random_state() -> None:
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device="cpu": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device="cpu": torch.set_rng_state(new_state)


def _without_cuda_device(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory so that a literal `device="cuda"` means the CPU."""

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return on_cpu


def _redirect_tensor_methods() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    plain_type = torch.Tensor.type

    def type_as_if_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The optimizer tells precisions apart by names such as 'torch.cuda.FloatTensor'."""
        answer = plain_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_as_if_on_cuda  # type: ignore[method-assign,assignment]


def _redirect_megatron_random() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


def _import_megatron_lightly() -> None:
    """Import Megatron with `torch.compile` doing nothing: at first use it would compile for minutes, for small models.

    The mark alone, on Megatron's fused functions, already imports the compiler, 22 MB and half a second. wandb, another
    20 MB, Megatron only wants for serving; the trainer imports it where metrics go there.
    """
    compile_function = torch.compile
    torch.compile = lambda model=None, **options: model if model is not None else (lambda function: function)  # type: ignore[assignment]
    hides_wandb = sys.modules.setdefault("wandb", None) is None  # type: ignore[arg-type]
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compile_function
        if hides_wandb:
            del sys.modules["wandb"]


def _speed_up_products() -> None:
    from megatron.core.tensor_parallel import layers

    from pretrain.model.tensor_region import linear_in_region

    for name in ("linear_with_frozen_weight", "linear_with_grad_accumulation_and_async_allreduce"):
        setattr(layers, name, linear_in_region)


def _shorten_rotation() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    from pretrain.model.rotation import rotate

    rope_utils._apply_rotary_pos_emb_bshd = rotate


def _skip_lone_collectives() -> None:
    """A group of one has nothing to reduce or gather, but gloo copies the whole buffers all the same, twice over."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, _only_in_company(getattr(buffers, name)))


def _only_in_company(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a collective whose input is, in a group of one, already its output."""

    @functools.wraps(collective)
    def on_several_ranks(
        output: torch.Tensor, tensor: torch.Tensor, *args: Any, group: Any, **kwargs: Any
    ) -> Any:
        if group.size() > 1:
            return collective(output, tensor, *args, group=group, **kwargs)
        assert output.data_ptr() == tensor.data_ptr(), "Megatron's buffers are sharded in place"
        return None

    return on_several_ranks


def _share_sockets_loop() -> None:
    """One thread waits on the sockets of all gloo groups, where torch starts one a group.

    Each wakes 100 times a second: with Megatron's twenty groups that takes 2 % of a core from every rank.
    """
    from torch.distributed import distributed_c10d

    distributed_c10d.ProcessGroupGloo = _GlooOnSharedDevice  # type: ignore[misc]


class _GlooOnSharedDevice(ProcessGroupGloo):
    """A gloo group on the devices of the group of all ranks, and with those freed when that group is."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        first = dist.group.WORLD and dist.group.WORLD._get_backend(torch.device("cpu"))
        if not isinstance(first, ProcessGroupGloo):
            super().__init__(store, rank, size, timeout)
            return
        theirs: Any = first.options  # Any: torch's type stubs have other names than torch
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices, options._threads = theirs._devices, theirs._threads
        options._timeout = timeout
        super().__init__(store, rank, size, options)


def use_one_thread_a_rank() -> None:
    """One compute thread a rank unless the user says otherwise: gloo ranks share the cores of one machine."""
    if not on_cuda() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def use_deterministic_kernels() -> None:
    """Have torch, cuBLAS and Transformer Engine refuse what gives other bits in a second run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(True)
