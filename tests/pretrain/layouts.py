"""The layouts of ranks under which every stage must train as on one rank, and faults that must show.

Shared by tests/pretrain/test_layouts.py and the worker it launches; imports neither torch nor Megatron.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.config import RunConfig
from tests.pretrain.tiny_runs import MODEL, STARTS, tiny_recipe

GLOBAL_BATCH_SIZE = 8
STEPS = 3
# Between attention and MLP of a block: of the trained base, the frozen base, the frozen IDM.
TWO_STAGES = {
    "base": "base*1.5 | base*2.5",
    "idm": "base*3.5 | base*0.5 idm*2",
    "policy": "base*4 idm*1.5 | idm*0.5 policy*2",
}
# Cuts within the base, the IDM and the policy, after the IDM, a stage of one MLP, and a last stage of heads alone.
FOUR_STAGES = {
    "base": "base*1 | base*1.5 | base*0.5 | base*1",
    "idm": "base*2 | base*2 idm*0.5 | idm*1.5 | ",
    "policy": "base*3 | base*1 idm*1 | idm*1 policy*0.5 | policy*1.5",
}
CUTS = {1: {}, 2: TWO_STAGES, 4: FOUR_STAGES}
WITHIN_IDM = {"idm": "base*4 idm*1 | idm*1"}


@dataclass(frozen=True)
class Layout:
    """Numbers of tensor, pipeline and data parallel ranks."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    micro_batch_size: int = 2
    stages: tuple[str, ...] = tuple(STARTS)
    layouts: tuple[tuple[str, str], ...] = ()

    @property
    def ranks(self) -> int:
        """World size."""
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        """Such as tp2_sp_pp1_dp2."""
        return f"tp{self.tensor}{'_sp' if self.sequence else ''}_pp{self.pipeline}_dp{self.data}"


# Every two sizes meet here: each TP with each PP, and each DP with each TP and each PP.
OF_ALL_STAGES = ("tp1_pp1_dp2", "tp1_pp2_dp1", "tp1_pp4_dp2",
                 "tp2_pp1_dp1", "tp2_pp2_dp2", "tp2_pp4_dp1",
                 "tp2_sp_pp1_dp2", "tp2_sp_pp2_dp1", "tp2_sp_pp4_dp1")  # fmt: skip


def _matrix() -> dict[str, Layout]:
    layouts = {}
    for tensor, sequence in ((1, False), (2, False), (2, True)):
        for pipeline in (1, 2, 4):
            for data in (1, 2):
                layout = Layout(tensor, pipeline, data, sequence, layouts=tuple(CUTS[pipeline].items()))
                if layout.name not in OF_ALL_STAGES:
                    layout = replace(layout, stages=("idm",))
                layouts[layout.name] = layout
    return layouts


LAYOUTS = {name: layout for name, layout in _matrix().items() if layout.ranks > 1}
"""All of TP {1, 2, 2 with SP} x PP {1, 2, 4} x DP {1, 2}: for the IDM, which has most to go wrong, and of the other
stages for `OF_ALL_STAGES`."""

TRAINED = [(stage, name) for name, layout in LAYOUTS.items() for stage in layout.stages]
"""Which stages train under which layout."""

SAVED = "tp2_sp_pp2_dp1"
"""The layout whose checkpoints one rank goes on from."""

FAULTS = {
    "noise_by_rank": Layout(data=2, stages=("idm",)),
    "choice_gradient_not_summed": Layout(tensor=2, stages=("idm",)),
    "norm_gradient_not_summed": Layout(tensor=2, sequence=True, stages=("idm",)),
    "boundary_without_gradient": Layout(pipeline=2, stages=("idm",), layouts=tuple(WITHIN_IDM.items())),
    "label_loss_of_one_vocabulary_part": Layout(tensor=2, stages=("idm",)),
    "layers_in_another_order": Layout(pipeline=2, stages=("policy",)),
    "halves_exchanged": Layout(pipeline=2, stages=("idm",), layouts=tuple(TWO_STAGES.items())),
    "halves_on_both_stages": Layout(pipeline=2, stages=("base",), layouts=tuple(TWO_STAGES.items())),
}
"""Each is a mistake that a layout can make, planted by tests/pretrain/layouts_worker.py."""


def layout_recipe(
    layout: Layout, stage: str, run_folder: Path, data: Path, reference: Path, steps: int = STEPS
) -> RunConfig:
    """The run of `stage` under `layout`, from the one-rank run of the stage before; published form.

    Its merge layers do not start at zero, so gradients reach the IDM from the first step.
    """
    start = STARTS[stage]
    return tiny_recipe(
        stage,
        run_folder,
        data,
        reference / start if start else None,
        model={**MODEL, "num_layers": 4},
        actions={"output": "reference", "num_idm_layers": 2, "num_policy_layers": 2},
        parallel={
            "tensor_parallel_size": layout.tensor,
            "pipeline_parallel_size": layout.pipeline,
            "sequence_parallel": layout.sequence,
            "pipeline_layout": dict(layout.layouts).get(stage),
        },
        training={
            "steps": steps,
            "global_batch_size": GLOBAL_BATCH_SIZE,
            # the usage regulariser is that of a micro-batch over all data-parallel ranks
            "micro_batch_size": layout.micro_batch_size // layout.data,
        },
        validation={"interval_steps": STEPS, "steps": 1},
        checkpoint={"interval_steps": STEPS},
    )
