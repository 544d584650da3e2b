"""The authors' outputs on a tiny random model, for the tests that compare with them."""

import json
import os
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open

VARIABLE = "COLA_REFERENCE_VECTORS"
ROPES = ("plain", "llama3")
TOLERANCE = 1e-3
PROMPT_TOKENS, NEW_TOKENS = 32, 24

needs_vectors = pytest.mark.skipif(
    not os.environ.get(VARIABLE), reason=f"{VARIABLE} does not name the file of the authors' outputs"
)


class Vectors(NamedTuple):
    """The authors' outputs: tensors by key, and the model's sizes."""

    tensors: dict[str, torch.Tensor]
    sizes: dict[str, Any]

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's weights under their published names."""
        prefix = "weights."
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}


def read_vectors() -> Vectors:
    """Read the file that the environment names."""
    with safe_open(os.environ[VARIABLE], "pt") as file:
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        return Vectors(tensors, json.loads(file.metadata()["config"]))


def wrong(found: dict[str, float]) -> set[str]:
    """Names of the outputs that differ by more than the tolerance."""
    return {name for name, difference in found.items() if difference > TOLERANCE}
