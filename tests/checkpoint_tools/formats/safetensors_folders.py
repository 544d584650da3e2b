"""Small folders of safetensors, and tensors as they can be compared, for the tests of both."""

from collections.abc import Mapping
from pathlib import Path

import torch
from hypothesis import strategies as st

from checkpoint_tools.formats.safetensors_files import open_safetensors, write_safetensors
from checkpoint_tools.formats.safetensors_header import DTYPES, METADATA_KEY
from checkpoint_tools.formats.tensor_reader import TensorFacts

MIB = 1 << 20
NAMES = st.text().filter(lambda name: name != METADATA_KEY)
FACTS = st.builds(
    TensorFacts,
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.sampled_from(sorted(DTYPES.values(), key=str)),
)


class TensorsInMemory:
    """A TensorReader over a dictionary."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.facts = {name: TensorFacts(tuple(value.shape), value.dtype) for name, value in tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].clone()


def random_tensor(facts: TensorFacts) -> torch.Tensor:
    """Any bytes that the type can have."""
    data = torch.randint(0, 2 if facts.dtype == torch.bool else 256, (facts.bytes,), dtype=torch.uint8)
    return data.view(facts.dtype).reshape(facts.shape)


def bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[TensorFacts, bytes]]:
    """Tensors as they can be compared: not-a-number equals itself, minus zero is not zero."""
    return {
        name: (
            TensorFacts(tuple(value.shape), value.dtype),
            value.reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, value in tensors.items()
    }


def write(folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int = MIB) -> Path:
    """Write all tensors into a new folder."""
    folder.mkdir(parents=True)
    write_safetensors(folder, TensorsInMemory(tensors), list(tensors), shard_bytes, progress=False)
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by our reader."""
    source = open_safetensors(folder)
    return {name: source.read(name) for name in source.facts}
