"""Speed and time of a run at stated efficiencies: arithmetic on published peaks."""

from typing import NamedTuple

from pretrain.config import RunConfig
from pretrain.flops import flops_per_token, fp8_flops_per_token
from pretrain.placement import balance, place_layers
from pretrain.planning.memory import micro_batches_a_step


class Gpu(NamedTuple):
    """A GPU by its data sheet; TFLOP/s are dense peaks of the tensor cores."""

    name: str
    bf16_tflops_per_second: float
    fp8_tflops_per_second: float | None
    """None: no FP8."""
    memory_gb: int
    """As sold, in 10^9 bytes."""

    @property
    def memory_gib(self) -> float:
        """The same in GiB."""
        return self.memory_gb * 1e9 / 2**30


class Efficiency(NamedTuple):
    """Shares of the peaks that a run reaches."""

    name: str
    bf16: float
    fp8: float | None
    """None: all products in BF16."""


class Estimate(NamedTuple):
    """A run on one kind of GPU at one efficiency."""

    tokens_per_second_a_gpu: float
    gpu_hours: float


GPUS = (
    Gpu("A100", 312, None, 80),
    Gpu("H100", 989.4, 1978.9, 80),
    Gpu("H200", 989.4, 1978.9, 141),
    Gpu("B200", 2250, 4500, 180),
)
# What one H200 reached on both stages of Llama-3.1-8B, without communication (docs/benchmarks.md), beside shares for a
# cluster: 37.6 % is what NVIDIA publishes for training Llama-3-8B in FP8 on H100, 744 of 1978.9 TFLOP/s (Megatron
# Bridge 25.11).
EFFICIENCIES = (
    Efficiency("BF16 40 %", 0.40, None),
    Efficiency("BF16 58 %, as one H200", 0.58, None),
    Efficiency("FP8 37.6 %, rest 50 %", 0.50, 0.376),
    Efficiency("FP8 45 %, rest 58 %, as one H200", 0.58, 0.45),
)


def pipeline_efficiency(config: RunConfig, gpus: int) -> float:
    """Share of the time that the pipeline stages are not waiting: for the slowest, and while filling and draining."""
    micro_batches = micro_batches_a_step(config, gpus)
    filling = micro_batches / (micro_batches + config.parallel.pipeline_parallel_size - 1)
    return balance(config, place_layers(config)) * filling


def estimate(config: RunConfig, gpus: int, gpu: Gpu, efficiency: Efficiency) -> Estimate | None:
    """The run on `gpus` of `gpu`; None where it has no peak for the products: FP8 on an A100, any in fp32.

    Communication counts only as far as it is in the efficiency, so tensor parallelism is slower than this.
    """
    if config.training.precision != "bf16":
        return None
    in_fp8 = sum(fp8_flops_per_token(config).values()) if efficiency.fp8 else 0.0
    seconds = (sum(flops_per_token(config).values()) - in_fp8) / (
        gpu.bf16_tflops_per_second * 1e12 * efficiency.bf16
    )
    if efficiency.fp8:
        if gpu.fp8_tflops_per_second is None or not in_fp8:
            return None
        seconds += in_fp8 / (gpu.fp8_tflops_per_second * 1e12 * efficiency.fp8)
    tokens_per_second = pipeline_efficiency(config, gpus) / seconds
    tokens = config.training.steps * config.tokens_per_step
    return Estimate(tokens_per_second, tokens / tokens_per_second / 3600)
