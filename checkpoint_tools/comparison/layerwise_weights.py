"""Models whose weights come when a module runs and go when it is done: memory holds one module, not the model.

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    stream_weights(model, reader.read, but=model.lm_head)
    model.model(tokens_BS)

The modules run their own code; only where their parameters come from is changed. Arithmetic is fp32 on the CPU.
Shapes: K positions, V vocabulary, H hidden.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

Read = Callable[[str], torch.Tensor]
HEAD_ROWS = 8192  # of the vocabulary, in fp32 at once: 134 MB at H = 4096


def stream_weights(model: nn.Module, read: Read, but: nn.Module | None = None) -> None:
    """Let every module of `model` have its own parameters, in fp32, while its forward runs.

    Args:
        model: on the meta device; stays there.
        read: gives the parameter of a name in `model`, of any floating type.
        but: the one module that is left as it is.
    """
    for prefix, module in model.named_modules():
        names = {own: f"{prefix}.{own}" for own, _ in module.named_parameters(recurse=False)}
        if names and module is not but:
            _stream(module, names, read)


def _stream(module: nn.Module, names: Mapping[str, str], read: Read) -> None:
    forward = module.forward
    # An embedding is the largest tensor of all: the few rows that are looked up are cast afterwards.
    is_embedding = hasattr(module, "embedding_dim")

    def forward_with_weights(*args: object, **keywords: object) -> object:
        if is_embedding:
            with holding(module, {own: read(name) for own, name in names.items()}):
                return forward(*args, **keywords).float()
        with holding(module, {own: read(name).float() for own, name in names.items()}):
            return forward(*args, **keywords)

    module.forward = forward_with_weights


@contextmanager
def holding(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let `module` have `tensors` in place of its parameters of these names."""
    before = {name: module._parameters[name] for name in tensors}
    for name, tensor in tensors.items():
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    try:
        yield
    finally:
        module._parameters.update(before)


def logits_by_rows(
    head: nn.Module, weight_VH: torch.Tensor, logits: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """All logits [K, V], from what `logits` gives while `head` has some rows of `weight_VH` as its weight."""
    chunks = []
    for rows_RH in weight_VH.split(HEAD_ROWS):
        with holding(head, {"weight": rows_RH.float()}):
            chunks.append(logits())
    return torch.cat(chunks, dim=-1)


def rounded(read: Read, dtypes: Mapping[str, torch.dtype]) -> Read:
    """`read`, with each tensor rounded to its type in `dtypes`, by name."""
    return lambda name: read(name).to(dtypes[name])
