"""The base run ahead, in groups of any size, gives the batches and states of the base run in time."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pretrain.base_ahead import GROUPS_AHEAD, BaseAhead
from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext
from pretrain.stages.contract import Batch, frozen_hidden
from tests.pretrain.tiny_runs import VOCAB_SIZE, tiny_recipe

B, S, MICRO_BATCHES = 2, 12, 7


@pytest.fixture
def model(context: ParallelContext) -> ColaModel:
    """A frozen base."""
    recipe = tiny_recipe("idm", Path("run"), Path("data"), Path("base"))
    model = ColaModel(recipe, context.groups, ("base",))
    model.freeze_all_but(())
    return model


def batches() -> Iterator[Batch]:
    """Different tokens in each."""
    for index in range(MICRO_BATCHES):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(VOCAB_SIZE, (B, S), generator=generator)
        yield Batch(tokens, tokens, torch.tensor([2 * index, 2 * index + 1]))


@pytest.mark.parametrize("group_size", [1, 2, 3, 10])
@pytest.mark.parametrize("ahead_before", [0, 1, 5])
def test_batches_keep_their_order_and_get_their_own_states(
    model: ColaModel, group_size: int, ahead_before: int
) -> None:
    ahead = BaseAhead(batches(), model, group_size)
    for _ in range(ahead_before):
        ahead.run_ahead()
    found = list(ahead)
    assert [batch.sample_index_B.tolist() for batch in found] == [
        b.sample_index_B.tolist() for b in batches()
    ]
    for batch, expected in zip(found, batches(), strict=True):
        with torch.no_grad():
            hidden_SBH = model.base.hidden(expected.tokens_BS)
        assert batch.hidden_SBH is not None and not batch.hidden_SBH.requires_grad
        torch.testing.assert_close(batch.hidden_SBH, hidden_SBH, rtol=1e-5, atol=1e-5)
        other_SBH = hidden_SBH.roll(1, dims=1)  # the twin: states of the other sample
        assert not torch.allclose(batch.hidden_SBH, other_SBH, rtol=1e-2)


def test_no_more_than_two_groups_wait(model: ColaModel) -> None:
    source = batches()
    ahead = BaseAhead(source, model, group_size=1)
    for _ in range(5):
        ahead.run_ahead()
    assert len(ahead.ready) == GROUPS_AHEAD
    assert next(source).sample_index_B[0] == 2 * GROUPS_AHEAD


def test_the_base_keeps_nothing_for_a_backward_pass(model: ColaModel) -> None:
    """Not a byte, ahead or in time; a base that is trained, the twin, keeps its activations."""

    def kept_elements(stage: str) -> int:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            batch = next(batches())
            if stage == "ahead":
                BaseAhead(batches(), model, group_size=2).run_ahead()
            elif stage == "in time":
                frozen_hidden(model, batch, None)
            else:
                model.base.hidden(batch.tokens_BS)
        return sum(kept)

    assert kept_elements("ahead") == kept_elements("in time") == 0
    model.freeze_all_but(("base",))
    assert kept_elements("trained") > 0
