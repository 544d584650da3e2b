"""How a process that works through a model on disk uses the machine."""

import ctypes

from pretrain.cpu_redirects import run_without_gpus

# malloc.h: numbers of mallopt's options.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def prepare_process() -> None:
    """For every command here to call first: no GPU, which nothing here needs, and memory that is used again."""
    run_without_gpus()
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Do not return freed memory to the system: one large tensor follows another, and new pages cost more than reading
    into them. glibc only.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(option, value)
