"""Rows that pad the vocabulary change nothing, whatever is in them: on one rank and on two that share it."""

from pathlib import Path

import pytest
import torch

from pretrain.parallel import ParallelContext
from tests.forked_ranks import start_program
from tests.pretrain.model.padded_vocabulary import CASES, VOCABULARIES, Case, outcome, padding_as_tokens

TOLERANCE = 1e-6
BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def differing(case: Case, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> set[str]:
    """What is not as in the model without padding, or not exactly zero in the padded rows."""
    tokens = VOCABULARIES[case.padding][0]
    names = set()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        axis = {"probabilities": 2, "embedding": 0, "head": 0}.get(name)
        if axis is not None:
            rest = tensor.narrow(axis, tokens, tensor.shape[axis] - tokens)
            assert rest.numel() > 0
            if rest.count_nonzero():
                names.add(name)
            tensor = tensor.narrow(axis, 0, tokens)
        largest = float(expected[name].abs().max())
        if not torch.allclose(tensor, expected[name], rtol=TOLERANCE, atol=TOLERANCE * largest):
            names.add(name)
    return names


@BY_NAME
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_padding_changes_nothing_on_one_rank(context: ParallelContext, case: Case, precision: str) -> None:
    """Numbers of padded rows are as large as there are, so that their logits are infinite or not numbers at all."""
    expected = outcome(context, case, padded=False, precision=precision)
    assert all(torch.isfinite(tensor).all() for tensor in expected.values())
    found = outcome(context, case, padded=True, precision=precision)
    assert differing(case, found, expected) == set()


@BY_NAME
def test_padding_as_tokens_shows_on_one_rank(context: ParallelContext, case: Case) -> None:
    """The fault twin: rows of tens take probability."""
    expected = outcome(context, case, padded=False)
    with padding_as_tokens():
        found = outcome(context, case, padded=True, filling=10.0)
    assert {"losses", "state", "probabilities"} <= differing(case, found, expected)
    assert not case.trained or "head" in differing(case, found, expected)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outcomes of all cases on two tensor-parallel ranks, with the fault and without."""
    folder = tmp_path_factory.mktemp("padded_vocabulary")
    start_program("tests.pretrain.model.padded_vocabulary", folder)
    return folder


@pytest.mark.distributed
@BY_NAME
def test_padding_changes_nothing_on_two_ranks(context: ParallelContext, two_ranks: Path, case: Case) -> None:
    """One rank without padding is the reference; the second rank may hold no token at all. The twin differs."""
    expected = outcome(context, case, padded=False)
    assert differing(case, torch.load(two_ranks / f"{case.name}.pt"), expected) == set()
    faulty = differing(case, torch.load(two_ranks / f"{case.name}_fault.pt"), expected)
    assert {"losses", "state", "probabilities"} <= faulty
