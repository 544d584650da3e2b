"""The configuration of a CoLA model: a Llama's, and the sizes of the parts that act on it.

Read by `modeling_cola.py` beside it. The `*_cola.py` files are copied into every exported model folder, where
`AutoConfig.from_pretrained(folder, trust_remote_code=True)` finds them: they import nothing of the project, and
run on transformers 5 and on 4.57, the last of the fours.
"""

import inspect
from typing import Any

from transformers import LlamaConfig

OUTPUT_FORMS = ("reference", "residual")


class ColaConfig(LlamaConfig):
    """Sizes of a frozen Llama (all of `LlamaConfig`'s fields) and of CoLA's parts around it.

    num_actions: size of the action codebook (K in the paper; 64 there).
    num_idm_layers: decoder layers of the inverse dynamics model; 0 leaves it out (enough for generation).
    num_merge_layers: MLPs that merge an action code into the base's hidden state, at least 1.
    num_policy_layers: decoder layers of the policy; 0 leaves it out (before the policy is trained).
    output_form: what the language-model head gets of the merged state s, h being the base's normed hidden
        state: "reference" norm(s) - h, as the authors' code has it; "residual" s itself.
    qkv_bias: the query, key and value projections of all decoder layers have a bias and the output projection
        has none, as in Qwen2.5.

    The authors' names for the four sizes (num_code, num_action_layer, num_dyna_layer, num_policy_layer) are
    understood as well. Raises ValueError naming every field that is wrong.
    """

    model_type = "cola"
    attribute_map = {  # noqa: RUF012  (transformers reads it from the class)
        "num_code": "num_actions",
        "num_action_layer": "num_idm_layers",
        "num_dyna_layer": "num_merge_layers",
        "num_policy_layer": "num_policy_layers",
    }
    # save_pretrained copies this file and names it in config.json.
    _auto_class = "AutoConfig"

    def __init__(
        self,
        num_actions: int = 64,
        num_idm_layers: int = 4,
        num_merge_layers: int = 2,
        num_policy_layers: int = 8,
        output_form: str = "reference",
        qkv_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        # Before the parent's turn, which may hold the same sizes under the authors' names.
        self.num_actions = num_actions
        self.num_idm_layers = num_idm_layers
        self.num_merge_layers = num_merge_layers
        self.num_policy_layers = num_policy_layers
        self.output_form = output_form
        self.qkv_bias = qkv_bias
        super().__init__(**_rope_as_understood(kwargs))
        if problems := self._problems():
            raise ValueError("the model's configuration is wrong: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        lowest = {"num_actions": 1, "num_idm_layers": 0, "num_merge_layers": 1, "num_policy_layers": 0}
        problems = [
            f"{name} is {getattr(self, name)!r}, must be at least {least}"
            for name, least in lowest.items()
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least
        ]
        if self.output_form not in OUTPUT_FORMS:
            problems.append(f"output_form is {self.output_form!r}, must be one of {', '.join(OUTPUT_FORMS)}")
        if not isinstance(self.qkv_bias, bool):
            problems.append(f"qkv_bias is {self.qkv_bias!r}, must be True or False")
        if self.attention_bias:
            problems.append(
                "attention_bias would put a bias on the output projection too: give qkv_bias instead"
            )
        return problems


def _rope_as_understood(fields: dict[str, Any]) -> dict[str, Any]:
    # rope_parameters is new in transformers 5, which still reads the two fields that it replaced. transformers 4
    # would take the new one for something unknown, and turn by the default angles.
    if "rope_parameters" in inspect.signature(LlamaConfig.__init__).parameters:
        return fields
    rest = dict(fields)
    if rope := dict(rest.pop("rope_parameters", None) or {}):
        if "rope_theta" in rope:
            rest["rope_theta"] = rope.pop("rope_theta")
        rest["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return rest
