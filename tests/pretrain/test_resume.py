"""A run stopped and resumed is the uninterrupted run, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from data_prep.output_files import write_sealed_json
from pretrain.checkpoints.checkpoint_folder import find_checkpoints, read_description
from tests.pretrain.tiny_runs import STARTS, metrics, saved_tensors, tiny_recipe, train_in_process

VOLATILE = ("elapsed_seconds", "tokens_per_second", "tflops_per_second", "memory_gib")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    """<stage>/straight: six steps at once; <stage>/resumed: three, then three more."""
    folder = tmp_path_factory.mktemp("resume")
    for stage, start in STARTS.items():
        start_from = folder / start / "straight" if start else None
        for name, stops in (("straight", (6,)), ("resumed", (3, 6))):
            for steps in stops:
                recipe = tiny_recipe(
                    stage, folder / stage / name, tiny_blend, start_from, training={"steps": steps}
                )
                train_in_process(recipe, resume=True)
    return folder


@pytest.mark.parametrize("stage", STARTS)
def test_resumed_run_equals_uninterrupted(runs: Path, stage: str) -> None:
    """Weights, Adam moments, master weights and every logged figure are equal to the last bit."""
    straight, resumed = (saved_tensors(runs / stage / name) for name in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    assert any("exp_avg_sq" in name for name in straight)
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []
    for split in ("train", "validation"):
        lines = [
            [
                {k: v for k, v in line.items() if k not in VOLATILE}
                for line in metrics(runs / stage / name, split)
            ]
            for name in ("straight", "resumed")
        ]
        lines[1] = [line for line in lines[1] if line["step"] in {line["step"] for line in lines[0]}]
        assert lines[0] == lines[1]


def test_a_lost_optimizer_state_shows(runs: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault twin: resuming without the optimizer's state gives other weights."""
    import pretrain.run

    faulty_run = runs / "idm" / "faulty"
    shutil.copytree(runs / "idm" / "resumed", faulty_run)
    shutil.rmtree(faulty_run / "checkpoints" / "step_00000006")
    monkeypatch.setattr(pretrain.run.checkpointing, "load_optimizer", lambda *_: None)
    train_in_process(tiny_recipe("idm", faulty_run, tiny_blend, runs / "base" / "straight"), resume=True)
    straight, faulty = saved_tensors(runs / "idm" / "straight"), saved_tensors(faulty_run)
    assert not torch.equal(straight["weights/idm.head.weight"], faulty["weights/idm.head.weight"])


@pytest.mark.parametrize(
    ("field", "value"), [("learning_rate", 3e-2), ("weight_decay", 5.0), ("beta1", 0.5), ("epsilon", 1.0)]
)
def test_the_optimizers_settings_are_the_recipes(
    runs: Path, tiny_blend: Path, field: str, value: float
) -> None:
    """Not the checkpoint's: one changed before the last three steps shows in the weights, the twin's do not."""
    ends = {}
    for name, optimizer in (("changed", {field: value}), ("twin", {})):
        run = runs / "idm" / f"{name}_{field}"
        shutil.copytree(runs / "idm" / "resumed", run)
        shutil.rmtree(run / "checkpoints" / "step_00000006")
        recipe = (run / "config.yaml").read_text().replace(str(runs / "idm" / "resumed"), str(run))
        (run / "config.yaml").write_text(recipe)
        start = runs / "base" / "straight"
        train_in_process(tiny_recipe("idm", run, tiny_blend, start, optimizer=optimizer), resume=True)
        ends[name] = saved_tensors(run)["weights/idm.head.weight"]
    straight = saved_tensors(runs / "idm" / "straight")["weights/idm.head.weight"]
    assert torch.equal(ends["twin"], straight)
    assert not torch.equal(ends["changed"], straight)


def test_resume_refuses_another_recipe(runs: Path, tiny_blend: Path) -> None:
    """What would make it another run is named with both values."""
    recipe = tiny_recipe("base", runs / "base" / "straight", tiny_blend, training={"global_batch_size": 16})
    with pytest.raises(UserError, match=r"training.global_batch_size: 8 -> 16"):
        train_in_process(recipe, resume=True)


def test_resume_keeps_the_base_it_started_from(
    runs: Path, tiny_blend: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Even after the base run has gone on: the newer base would be another model."""
    folder = tmp_path_factory.mktemp("moving_base")
    for stage, steps in (("base", 3), ("idm", 3), ("base", 6), ("idm", 6)):
        start_from = folder / "base" if stage == "idm" else None
        recipe = tiny_recipe(stage, folder / stage, tiny_blend, start_from, training={"steps": steps})
        train_in_process(recipe, resume=True)
    descriptions = [read_description(path) for path in find_checkpoints(folder / "idm")]
    assert [description.step for description in descriptions] == [3, 6]
    assert {description.start_from for description in descriptions} == {"../base/checkpoints/step_00000003"}


def test_resume_refuses_other_shards(runs: Path, tiny_blend: Path, tmp_path: Path) -> None:
    """The order of samples would be another one."""
    other = tmp_path / "blend"
    shutil.copytree(tiny_blend, other)
    manifest = json.loads((other / "blend.json").read_text())
    write_sealed_json(other / "blend.json", manifest | {"plan_fingerprint": "0" * 64})
    recipe = tiny_recipe("base", runs / "base" / "straight", other, training={"steps": 7})
    with pytest.raises(UserError, match=r"holds other shards than those .*step_00000006 was trained on"):
        train_in_process(recipe, resume=True)


def test_finished_run_is_left_alone(runs: Path, tiny_blend: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resuming a finished run says so and writes nothing."""
    before = (runs / "base" / "straight" / "metrics.jsonl").read_bytes()
    train_in_process(tiny_recipe("base", runs / "base" / "straight", tiny_blend), resume=True)
    assert "already at step 6" in capsys.readouterr().out
    assert (runs / "base" / "straight" / "metrics.jsonl").read_bytes() == before
