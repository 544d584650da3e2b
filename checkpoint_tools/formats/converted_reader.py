"""A reader seen under the names of the other format: tensors are renamed, split and joined as they are read."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from checkpoint_tools.formats.tensor_reader import TensorFacts, TensorReader
from checkpoint_tools.formats.weight_map import Rule, Tensors

# Names read, names given, and the conversion between them.
Step = tuple[tuple[str, ...], tuple[str, ...], Callable[[Tensors], Tensors]]


def seen_as_huggingface(reader: TensorReader, rules: Sequence[Rule]) -> "ConvertedReader":
    """Our parameters in `reader` under their Hugging Face names."""
    return ConvertedReader(reader, [(rule.megatron, rule.huggingface, rule.to_huggingface) for rule in rules])


def seen_as_megatron(reader: TensorReader, rules: Sequence[Rule]) -> "ConvertedReader":
    """Hugging Face tensors in `reader` under the names of our parameters."""
    return ConvertedReader(reader, [(rule.huggingface, rule.megatron, rule.to_megatron) for rule in rules])


class ConvertedReader:
    """A `TensorReader` of what the `steps` give. KeyError names a tensor that they need and `reader` lacks.

    One step's tensors are held until they are asked for: in the order of `facts` each source is read once.
    """

    def __init__(self, reader: TensorReader, steps: Sequence[Step]) -> None:
        self._reader = reader
        self._step_of = {name: step for step in steps for name in step[1]}
        self._held: dict[str, torch.Tensor] = {}
        self.facts: Mapping[str, TensorFacts] = dict(self._converted_facts(steps))
        """In the order of the steps."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, converted."""
        if name not in self._held:
            sources, targets, convert = self._step_of[name]
            self._held.clear()  # before the next ones are read, or memory would hold both
            tensors = convert(tuple(self._reader.read(source) for source in sources))
            self._held = {target: t.contiguous() for target, t in zip(targets, tensors, strict=True)}
        return self._held.pop(name)

    def _converted_facts(self, steps: Sequence[Step]) -> Iterator[tuple[str, TensorFacts]]:
        for sources, targets, convert in steps:
            facts = [self._reader.facts[source] for source in sources]
            shapes = convert(tuple(torch.empty(f.shape, dtype=f.dtype, device="meta") for f in facts))
            for target, shape in zip(targets, shapes, strict=True):
                yield target, TensorFacts(tuple(shape.shape), shape.dtype)


def read_as(reader: TensorReader, dtype: torch.dtype) -> TensorReader:
    """`reader` with its tensors of floating point cast to `dtype` as they are read."""
    return _CastReader(reader, dtype)


class _CastReader:
    def __init__(self, reader: TensorReader, dtype: torch.dtype) -> None:
        self._reader, self._dtype = reader, dtype
        self.facts: Mapping[str, TensorFacts] = {
            name: TensorFacts(facts.shape, dtype) if facts.dtype.is_floating_point else facts
            for name, facts in reader.facts.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self._reader.read(name).to(self.facts[name].dtype)
