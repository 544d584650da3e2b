"""EleutherAI's evaluation harness runs an exported folder as it is, and sees the model under the policy's actions.

Needs requirements-eval.txt; skipped without it.
"""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM
from tests.checkpoint_tools.random_cola import random_cola, save_with_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs requirements-eval.txt")

QUESTIONS: list[dict[str, Any]] = [
    {"text": " w5 w9 w100", "choices": [" w7 w30", " w8", " w41 w42 w43"], "answer": 0},
    {"text": " w17", "choices": [" w3", " w300 w301 w302 w303", " w50"], "answer": 2},
    {"text": " w60 w61 w62 w63 w64 w65", "choices": [" w66", " w67", " w68 w69"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: text
target_delimiter: ""
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
WRITING = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: [" w1000"]
  max_gen_toks: 6
  do_sample: false
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def model() -> ColaForCausalLM:
    """Not to be changed by a test."""
    return random_cola(eos_token_id=1, pad_token_id=1)


@pytest.fixture
def samples(
    model: ColaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, list[dict[str, Any]]], PreTrainedTokenizerFast]:
    """What the harness notes of each question of the two tasks, in order, and the folder's tokenizer."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    tokenizer = save_with_tokenizer(model, tmp_path / "model")
    data, tasks = tmp_path / "questions.jsonl", tmp_path / "tasks"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    tasks.mkdir()
    for name, rest in (("cola_choice", CHOICE), ("cola_writing", WRITING)):
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + rest)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'model'},trust_remote_code=True",
        tasks=["cola_choice", "cola_writing"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=3,
        log_samples=True,
        bootstrap_iters=0,
    )
    by_task = {
        name: sorted(notes, key=lambda note: note["doc_id"]) for name, notes in results["samples"].items()
    }
    return by_task, tokenizer


@torch.inference_mode()
def log_likelihood(model: ColaForCausalLM, context: list[int], continuation: list[int], shift: int) -> float:
    """Of the continuation under the policy's likeliest actions, or the actions `shift` after them."""
    tokens_BS = torch.tensor([context + continuation])
    actions_BS = (model.policy_logits(tokens_BS).argmax(-1) + shift) % model.config.num_actions
    log_probs_SV = model.forward_world_model(tokens_BS, actions_BS)[0].log_softmax(-1)
    positions = range(len(context) - 1, len(context) + len(continuation) - 1)
    return float(sum(log_probs_SV[t, token] for t, token in zip(positions, continuation, strict=True)))


def test_the_harness_scores_and_generates_under_the_policys_actions(
    model: ColaForCausalLM, samples: tuple[dict[str, list[dict[str, Any]]], PreTrainedTokenizerFast]
) -> None:
    notes, tokenizer = samples
    for question, choice, writing in zip(QUESTIONS, notes["cola_choice"], notes["cola_writing"], strict=True):
        context = tokenizer.encode(question["text"])
        found = [float(response[0][0]) for response in choice["resps"]]
        for shift, is_right in ((0, True), (1, False)):
            expected = [
                log_likelihood(model, context, tokenizer.encode(text), shift) for text in question["choices"]
            ]
            assert (found == pytest.approx(expected, abs=1e-3)) is is_right
        generated = model.generate(torch.tensor([context]), max_new_tokens=6)
        assert writing["resps"] == [[tokenizer.decode(generated[0, len(context) :])]]
