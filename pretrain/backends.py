"""What this machine offers, and what a run will use of it: devices, kernels, optimizer, collectives, FP8.

`find_backends()` looks; what follows from the facts is decided by the properties of `Backends`, and nowhere else.
Nothing here imports Megatron, and Transformer Engine is imported only where there is CUDA: without CUDA Megatron would
choose its kernels and fail, which is why `pretrain.cpu_redirects` hides it there.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.config import RunConfig

ApexKind = Literal["none", "nvidia", "incomplete", "foreign"]
# Lowest compute capability, and for blockwise lowest CUDA, at which Transformer Engine has the kernels.
BF16_CAPABILITY = (8, 0)
FP8_CAPABILITY = (9, 0)
BLOCKWISE_CUDA = (12, 9)
INSTALL_REMEDY = "docs/gpu.md says how to install it"


@dataclass(frozen=True, kw_only=True)
class Backends:
    """Facts about this process's machine, and what follows from them."""

    cuda: bool = False
    """torch sees a CUDA device."""
    device_name: str = "CPU"
    """Of the current device."""
    device_count: int = 0
    """CUDA devices that this process sees."""
    compute_capability: tuple[int, int] | None = None
    """Of the current device; None without CUDA."""
    device_memory_gib: float | None = None
    """Of the current device; None without CUDA."""
    cuda_version: tuple[int, int] | None = None
    """Toolkit that torch was built with; None for a CPU build."""
    nccl: str | None = None
    """Version of the NCCL in torch; None where there is none or no CUDA."""
    transformer_engine: str | None = None
    """Version, where it is installed, imports, and there is CUDA; else None."""
    transformer_engine_error: str | None = None
    """Why an installed Transformer Engine cannot be imported on a CUDA machine."""
    apex: ApexKind = "none"
    """nvidia; incomplete: NVIDIA's without its CUDA extensions; foreign: any other package or folder of the name."""
    apex_location: str | None = None
    """Where the module of that name lies."""

    @property
    def collectives(self) -> Literal["nccl", "gloo"]:
        """What torch.distributed speaks between ranks."""
        return "nccl" if self.cuda else "gloo"

    @property
    def layer_spec(self) -> Literal["transformer_engine", "local"]:
        """Whose linear layers and norms the model is made of."""
        return "transformer_engine" if self.transformer_engine else "local"

    @property
    def attention(self) -> Literal["transformer_engine", "scaled_dot_product_attention"]:
        """Whose core attention: Transformer Engine's (FlashAttention or cuDNN), or torch's."""
        return "transformer_engine" if self.transformer_engine else "scaled_dot_product_attention"

    @property
    def fused_optimizer(self) -> Literal["transformer_engine", "apex", "torch"]:
        """Whose AdamW Megatron takes; its own order of preference."""
        if self.transformer_engine:
            return "transformer_engine"
        return "apex" if self.cuda and self.apex == "nvidia" else "torch"

    @property
    def fp8_recipes(self) -> tuple[str, ...]:
        """FP8 recipes that can run here."""
        return tuple(
            name for name in ("tensorwise", "delayed", "blockwise") if fp8_obstacle(name, self) is None
        )


def fp8_obstacle(recipe: str, backends: Backends) -> str | None:
    """What keeps the FP8 `recipe` from running on `backends`; None if nothing does."""
    if not backends.cuda or backends.compute_capability is None:
        return "a GPU of compute capability 9.0 or more and Transformer Engine; torch sees no GPU here"
    if backends.compute_capability < FP8_CAPABILITY:
        return f"a GPU of compute capability 9.0 or more; {_device(backends)}"
    if backends.transformer_engine is None:
        return f"Transformer Engine, which is not usable here; {INSTALL_REMEDY}"
    if recipe == "blockwise" and (backends.cuda_version is None or backends.cuda_version < BLOCKWISE_CUDA):
        return f"a torch built with CUDA 12.9 or later; this one has {_dotted(backends.cuda_version)}"
    return None


def find_backend_problems(config: RunConfig, backends: Backends) -> list[str]:
    """Everything in `config` that this machine cannot do, each with its remedy, and what is wrong with the machine."""
    problems = find_machine_problems(backends)
    training = config.training
    capability = backends.compute_capability
    if training.precision == "bf16" and capability is not None and capability < BF16_CAPABILITY:
        problems.append(
            f"training.precision: bf16 needs a GPU of compute capability 8.0 or more; {_device(backends)}; set fp32"
        )
    for field, recipe in (("training.fp8", training.fp8), ("training.base_fp8", training.base_fp8)):
        obstacle = fp8_obstacle(recipe, backends) if recipe != "off" else None
        if obstacle is not None:
            problems.append(f"{field}: {recipe} needs {obstacle}; else set {field} off")
    return problems


def find_machine_problems(backends: Backends) -> list[str]:
    """What would break any run here, whatever its recipe."""
    problems = []
    if backends.apex == "foreign":
        problems.append(
            f"apex: {backends.apex_location} is not NVIDIA's apex, yet Megatron takes any module of that name for it; "
            "`pip uninstall apex`, or start from another folder if it is a source tree"
        )
    if backends.cuda and backends.apex == "incomplete":
        problems.append(
            f"apex: {backends.apex_location} was built without its CUDA extensions, so its optimizer fails; "
            "build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or `pip uninstall apex`"
        )
    if backends.transformer_engine_error is not None:
        problems.append(
            f"transformer_engine: is installed but does not import ({backends.transformer_engine_error}); "
            f"{INSTALL_REMEDY}, or uninstall it"
        )
    if backends.cuda and backends.nccl is None:
        problems.append(
            "nccl: this torch has CUDA but no NCCL, which GPU ranks need; install PyPI's torch for Linux"
        )
    return problems


def find_backends() -> Backends:
    """Look at this machine. Needs torch; takes seconds where Transformer Engine is imported."""
    import torch  # not at the top: the doctor reads this module where torch is missing

    apex, apex_location = find_apex()
    cuda_version = _major_minor(torch.version.cuda)
    if not torch.cuda.is_available():
        return Backends(cuda_version=cuda_version, apex=apex, apex_location=apex_location)
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    version, error = _find_transformer_engine()
    return Backends(
        cuda=True,
        device_name=device.name,
        device_count=torch.cuda.device_count(),
        compute_capability=(device.major, device.minor),
        device_memory_gib=round(device.total_memory / 2**30, 1),
        cuda_version=cuda_version,
        nccl=_nccl_version(),
        transformer_engine=version,
        transformer_engine_error=error,
        apex=apex,
        apex_location=apex_location,
    )


def find_apex() -> tuple[ApexKind, str | None]:
    """Which `apex` Python would import, and from where; found without running any of its code."""
    try:
        spec = importlib.util.find_spec("apex")
    except ValueError:  # a module without a spec stands in sys.modules: not a package
        return "foreign", None
    if spec is None:
        return "none", None
    folders = list(spec.submodule_search_locations or [])
    location = folders[0] if folders else str(spec.origin)
    if not any((Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "foreign", location
    return ("nvidia" if importlib.util.find_spec("amp_C") else "incomplete"), location


def _find_transformer_engine() -> tuple[str | None, str | None]:
    """(version, error): both None where it is not installed."""
    try:
        if importlib.util.find_spec("transformer_engine") is None:
            return None, None
        importlib.import_module("transformer_engine.pytorch")
        return importlib.import_module("transformer_engine").__version__, None
    except (
        Exception
    ) as error:  # a wrong build fails with OSError, AssertionError, RuntimeError or ImportError
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _nccl_version() -> str | None:
    import torch

    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(str(part) for part in torch.cuda.nccl.version())


def _major_minor(version: str | None) -> tuple[int, int] | None:
    if version is None:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int] | None) -> str:
    return "none" if version is None else f"{version[0]}.{version[1]}"


def _device(backends: Backends) -> str:
    return f"{backends.device_name} has {_dotted(backends.compute_capability)}"
