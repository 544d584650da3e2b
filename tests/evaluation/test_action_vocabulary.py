"""What an action is said to say follows from the world model, weighted by the policy."""

import json
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from evaluation.action_vocabulary import (
    ActionVocabularyConfig,
    action_token_probs,
    count_actions,
    run,
    top_tokens,
    visible_token,
)
from evaluation.huggingface_model import ExportedModel
from tests.checkpoint_tools.random_cola import random_tokens
from tests.evaluation.known_cola import KnownCola
from tests.evaluation.tiny_demo import CHINESE_WORDS, NUM_ACTIONS, WORDS

VOCAB_SIZE = len(WORDS) + 2


@torch.no_grad()
def test_probabilities_are_averages_weighted_by_the_policy(exported: ExportedModel) -> None:
    tokens_NS = random_tokens(6, 9, seed=2, vocab_size=VOCAB_SIZE)
    probs_AV = action_token_probs(exported.model, tokens_NS, progress=False)
    assert torch.allclose(probs_AV.sum(-1), torch.ones(NUM_ACTIONS, dtype=torch.float64))
    context = tokens_NS[:, :-1]
    world = exported.model.forward_world_model(context, 5).softmax(-1).flatten(0, 1)
    weights = exported.model.policy_logits(context).softmax(-1)[..., 5].flatten()
    expected = (weights[:, None] * world).sum(0) / weights.sum()
    assert torch.allclose(probs_AV[5].float(), expected, atol=1e-5)
    assert not torch.allclose(probs_AV[5].float(), world.mean(0), atol=1e-3), "unweighted would pass as well"


def test_telling_tokens_are_likely_and_set_apart(exported: ExportedModel) -> None:
    # Token 2 is frequent under both actions, 3 is rare but only action 0's, 4 is action 1's own.
    probs_AV = torch.zeros(2, VOCAB_SIZE, dtype=torch.float64)
    probs_AV[0, [2, 3, 4]] = torch.tensor([0.90, 0.08, 0.02], dtype=torch.float64)
    probs_AV[1, [2, 4]] = torch.tensor([0.60, 0.40], dtype=torch.float64)
    first, second = top_tokens(probs_AV, [3, 1], exported.tokenizer, top=2)
    words = ["<unk>", "</s>", *WORDS]
    assert [token.text for token in first.tokens] == [words[2], words[3]]
    assert second.tokens[0].text == words[4]
    assert second.tokens[0].lift == pytest.approx(0.40 / 0.21)
    assert first.tokens[1].lift == pytest.approx(2)
    assert (first.usage, second.usage) == (0.75, 0.25)


def test_actions_are_counted_where_the_idm_reads_them() -> None:
    model = KnownCola(vocab_size=10, num_actions=4)
    assert count_actions(model, torch.tensor([[0, 1, 6], [3, 3, 9]])) == [0, 2, 1, 1]


def test_white_space_is_made_visible(exported: ExportedModel) -> None:
    shown = {word: visible_token(exported.tokenizer, index + 2) for index, word in enumerate(WORDS)}
    assert shown[" word1"] == "\u00b7word1"
    assert shown["\n"] == "\u21b5"
    assert shown[CHINESE_WORDS[0]] == CHINESE_WORDS[0]


def test_command_writes_every_action(demo_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "vocabulary.json"
    config = ActionVocabularyConfig(
        model=demo_folder / "hf",
        data=demo_folder / "data",
        output=output,
        tokens=200,
        sequence_length=20,
        top=3,
    )
    run(config)
    actions = json.loads(output.read_text())["actions"]
    assert [entry["action"] for entry in actions] == list(range(NUM_ACTIONS))
    assert sum(entry["usage"] for entry in actions) == pytest.approx(1)
    assert all(len(entry["tokens"]) == 3 for entry in actions)
    with pytest.raises(UserError, match="--overwrite"):
        run(config)
