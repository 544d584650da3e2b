"""The README of an exported folder: how to use it, and what the run recorded; nothing that was not measured."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoint_tools.formats.opened_model import OpenedCheckpoint
from pretrain.config import METRICS_FILE

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
---
"""

USE = {
    "cola": """# A CoLA model: a frozen Llama steered by latent actions

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
model.generate(ids, max_new_tokens=32)                  # the policy chooses the actions
model.generate(ids, max_new_tokens=32, action_plan=17)  # action 17 throughout
model.infer_actions(ids)                                # the actions that led from token to token
```
""",
    "lamda-rl": """# A CoLA model in the layout of the published weights

Tensor names and config.json are those that the authors' code reads (github.com/LAMDA-RL/CoLA).
""",
    "base": """# A base language model

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
```
""",
}

METHOD = "Method: Controlling Large Language Model with Latent Action, ICML 2025, arXiv 2503.21383.\n"
# Of the last validation before the checkpoint, where there was one.
MEASURED = ("loss", "prediction_loss", "action_accuracy", "alive_actions")


def model_card(checkpoint: OpenedCheckpoint, parts: tuple[str, ...], layout: str) -> str:
    """Markdown with the facts of `checkpoint`'s run and its last validation."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(checkpoint, parts))
    use = USE["base" if parts == ("base",) else layout]
    method = "" if parts == ("base",) else f"\n{METHOD}"
    return f"{HEADER}{use}\n| | |\n|---|---|\n{rows}\n{method}"


def _facts(checkpoint: OpenedCheckpoint, parts: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    description, recipe = checkpoint.description, checkpoint.recipe
    yield "stage", description.stage
    yield "parts", ", ".join(parts)
    if description.step:
        yield "steps", f"{description.step:,}"
        yield "tokens of this stage", f"{description.consumed_tokens:,}"
        yield "training data", recipe.data.path
    else:
        yield "imported from", recipe.data.path
    if "world_model" in parts:
        yield "actions", recipe.actions.num_actions
        yield "output form", recipe.actions.output
    if "world_model" in parts and description.step:
        yield "regulariser", f"{recipe.actions.regulariser}, {recipe.actions.regulariser_coefficient}"
    yield from _last_validation(checkpoint).items()
    yield "written by", f"megatron-core {description.megatron_version}"


def _last_validation(checkpoint: OpenedCheckpoint) -> dict[str, str]:
    """Figures of the run's last validation up to the checkpoint's step, from its metrics file."""
    file = checkpoint.folder.parent.parent / METRICS_FILE
    lines = _json_lines(file) if file.is_file() else []
    step = checkpoint.description.step
    before = [
        line for line in lines if line.get("split") == "validation" and line.get("step", step + 1) <= step
    ]
    if not before:
        return {}
    last = before[-1]
    return {
        f"validation {name.replace('_', ' ')}, step {last['step']}": f"{last[name]:.4g}"
        for name in MEASURED
        if name in last
    }


def _json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
