"""A self-contained checkpoint needs no other: with the run that it started from gone, all goes on as if it were there.

Fault twins are ordinary checkpoints in the same place.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from pretrain.checkpoints.checkpoint_folder import locate_parts, read_description, resolve_checkpoint
from pretrain.config import RunConfig
from tests.forked_ranks import start_program
from tests.pretrain.self_contained_worker import LAYOUTS, PADDED, layout_recipe
from tests.pretrain.tiny_runs import VOCAB_SIZE, saved_tensors, series, tiny_recipe, train_in_process

# Proportions of Llama-3.1-8B at half its depth: a base of 5.5 times what stage idm trains, an eighth of it in tables.
LIKE_8B = {
    "hidden_size": 64,
    "ffn_hidden_size": 224,
    "num_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_size": 8,
}


def recipe(stage: str, run: Path, blend: Path, start: Path | None, steps: int, whole: bool) -> RunConfig:
    """A run of a model with a padded vocabulary; `whole`: of self-contained checkpoints."""
    return tiny_recipe(
        stage,
        run,
        blend,
        start,
        model=PADDED,
        training={"steps": steps},
        checkpoint={"self_contained": whole},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    """Runs whose base is gone.

    straight: six steps, with a policy from the third; whole and ordinary: three, the former self-contained; and
    those of two ranks.
    """
    folder = tmp_path_factory.mktemp("self_contained")
    base = folder / "base"
    train_in_process(recipe("base", base, tiny_blend, None, 3, whole=False))
    for name, steps in (("straight", 6), ("whole", 3), ("ordinary", 3)):
        train_in_process(recipe("idm", folder / name, tiny_blend, base, steps, whole=name == "whole"))
    start = folder / "straight" / "checkpoints" / "step_00000003"
    train_in_process(recipe("policy", folder / "straight_policy", tiny_blend, start, 3, whole=False))
    start_program("tests.pretrain.self_contained_worker", tiny_blend, base, folder)
    shutil.rmtree(base)
    return folder


def resumed(runs: Path, name: str, blend: Path, folder: Path, whole: bool) -> Path:
    """A copy of the run in `folder`, three steps later."""
    # Beside the others, so that the relative way to the base stays the same.
    run = runs / f"{folder.name}_{name}"
    shutil.copytree(runs / name, run)
    train_in_process(recipe("idm", run, blend, runs / "base", 6, whole), resume=True)
    return run


def test_resumes_as_uninterrupted_without_its_base(runs: Path, tiny_blend: Path, tmp_path: Path) -> None:
    """Weights, optimizer state and losses to the last bit; and the base is inside, once, with its fingerprints."""
    run = resumed(runs, "whole", tiny_blend, tmp_path, whole=True)
    expected, found = saved_tensors(runs / "straight"), saved_tensors(run)
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert {name.split(".")[0] for name in found.keys() - expected.keys()} == {"weights/base"}
    assert series(run, "loss").tolist() == series(runs / "straight", "loss").tolist()
    ours, theirs = (read_description(resolve_checkpoint(path)) for path in (run, runs / "straight"))
    assert ours.fingerprints == theirs.fingerprints
    assert ours.parts == ["base", "idm", "world_model"] and theirs.parts == ["idm", "world_model"]
    assert ours.start_from == theirs.start_from == "../base/checkpoints/step_00000003"


def test_an_ordinary_run_does_not_resume_without_its_base(
    runs: Path, tiny_blend: Path, tmp_path: Path
) -> None:
    """One line that names the checkpoint and what it lacks."""
    checkpoint = resolve_checkpoint(runs / "ordinary")
    for whole in (False, True):  # the field is too late now
        with pytest.raises(UserError) as caught:
            resumed(runs, "ordinary", tiny_blend, tmp_path / str(whole), whole)
        said = str(caught.value).replace(f"{whole}_ordinary", "ordinary")
        start = runs / "base" / "checkpoints" / "step_00000003"
        words = f"1 problem(s) in this run: start_from: {checkpoint}: takes base from {start}, which it started from"
        assert said.startswith(words) and "\n" not in said


def test_a_run_whose_base_is_gone_stays_self_contained(runs: Path, tiny_blend: Path, tmp_path: Path) -> None:
    """Its next checkpoints would be without a base for ever."""
    with pytest.raises(
        UserError, match=r"checkpoint\.self_contained: leave it on, for only .*_whole/"
    ) as caught:
        resumed(runs, "whole", tiny_blend, tmp_path, whole=False)
    assert str(caught.value).startswith("1 problem(s)")


@pytest.mark.parametrize("whole", [False, True])
def test_a_policy_is_trained_on_it(runs: Path, tiny_blend: Path, tmp_path: Path, whole: bool) -> None:
    """With the weights it has on an IDM whose base is there; self-contained itself, it needs no IDM either."""
    idm = shutil.copytree(runs / "whole", tmp_path / "idm")
    train_in_process(recipe("policy", tmp_path / "policy", tiny_blend, idm, 3, whole))
    checkpoint = resolve_checkpoint(tmp_path / "policy")
    expected = read_description(resolve_checkpoint(runs / "straight_policy"))
    assert read_description(checkpoint).fingerprints == expected.fingerprints
    shutil.rmtree(idm)
    if whole:
        assert locate_parts(checkpoint) == dict.fromkeys(("base", "idm", "world_model", "policy"), checkpoint)
    else:
        with pytest.raises(
            UserError, match=r"takes base, idm, world_model from .*/idm/checkpoints/step_00000003"
        ):
            locate_parts(checkpoint)


def test_a_policy_is_not_trained_on_an_ordinary_run(runs: Path, tiny_blend: Path, tmp_path: Path) -> None:
    match = rf"start_from: {re.escape(str(runs))}/ordinary/\S+: takes base from {re.escape(str(runs))}/base/"
    with pytest.raises(UserError, match=match):
        train_in_process(recipe("policy", tmp_path / "policy", tiny_blend, runs / "ordinary", 3, whole=False))


def test_only_what_is_missing_is_looked_for(runs: Path) -> None:
    """The trained parts of an ordinary checkpoint can be read without the base."""
    ordinary = resolve_checkpoint(runs / "ordinary")
    places = locate_parts(ordinary, ("idm", "world_model"))
    assert places == dict.fromkeys(("idm", "world_model"), ordinary)
    with pytest.raises(UserError, match=r"takes base from"):
        locate_parts(ordinary, ("idm", "base"))


def test_another_base_in_the_same_place_is_found(tiny_blend: Path, tmp_path: Path) -> None:
    """A resumed run holds its base against its own record, whatever the folder says of itself."""
    for name, seed in (("base", 42), ("idm", 42), ("base", 7)):
        start = tmp_path / "base" if name == "idm" else None
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        fields = vars(recipe(name, tmp_path / name, tiny_blend, start, 3, whole=False)) | {"seed": seed}
        train_in_process(RunConfig(**fields))
    with pytest.raises(UserError, match=r"tensor\(s\) are not what was saved, first base\."):
        train_in_process(
            recipe("idm", tmp_path / "idm", tiny_blend, tmp_path / "base", 6, whole=False), resume=True
        )


def stored_bytes(folder: Path) -> int:
    """Bytes of all files in the folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_ordinary_checkpoints_are_smaller(tiny_blend: Path, tmp_path: Path) -> None:
    """In the proportions of Llama-3.1-8B, by far where weights alone count and still with the optimizer's state."""
    training = {"steps": 1, "precision": "bf16"}
    actions = {"num_actions": 16, "num_idm_layers": 2, "num_merge_layers": 1}
    found: dict[str, Path] = {}
    for stage, name in (("base", "base"), ("idm", "ordinary"), ("idm", "whole")):
        start = tmp_path / "base" if stage == "idm" else None
        config = tiny_recipe(
            stage, tmp_path / name, tiny_blend, start,
            model=LIKE_8B, actions=actions, training=training, checkpoint={"self_contained": name == "whole"},
        )  # fmt: skip
        train_in_process(config)
        found[name] = resolve_checkpoint(tmp_path / name)
    weights = {name: stored_bytes(checkpoint / "weights") for name, checkpoint in found.items()}
    assert weights["whole"] == pytest.approx(weights["ordinary"] + weights["base"], rel=0.05)  # once each
    assert weights["ordinary"] < 0.25 * weights["whole"]
    assert stored_bytes(found["ordinary"]) < 0.6 * stored_bytes(found["whole"])


def bytes_of_ranks(run: Path) -> np.ndarray:
    """Bytes that each of two ranks wrote into weights/."""
    weights = resolve_checkpoint(run) / "weights"
    return np.array([sum(file.stat().st_size for file in weights.glob(f"__{rank}_*")) for rank in range(2)])


@pytest.mark.distributed
def test_every_rank_writes_its_own_share(runs: Path) -> None:
    """Tensor-parallel ranks half each; pipeline stages their own of embedding and head, nearly all that a base is.

    The twins, one rank that writes all of the base and two that both do, are outside of the bounds.
    """
    halves = bytes_of_ranks(runs / "tensor")
    in_all = stored_bytes(resolve_checkpoint(runs / "whole") / "weights")
    assert halves / in_all == pytest.approx(0.5, abs=0.05)
    grown = bytes_of_ranks(runs / "pipeline") - bytes_of_ranks(runs / "pipeline_ordinary")
    table = (VOCAB_SIZE + PADDED["vocab_padding"]) * 32 * 4
    base_bytes = sum(
        tensor.nbytes for name, tensor in saved_tensors(runs / "whole").items() if "/base." in name
    )
    assert (table < grown).all() and (grown < base_bytes - 0.5 * table).all()


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_one_rank_resumes_what_two_have_saved(runs: Path, tiny_blend: Path, layout: str) -> None:
    """Without the base; checked against its fingerprints, and by the losses."""
    assert LAYOUTS[layout][1]
    expected = read_description(resolve_checkpoint(runs / "whole")).fingerprints
    found = read_description(resolve_checkpoint(runs / layout)).fingerprints
    assert {name for name in expected if expected[name] == found[name]} >= {
        name for name in expected if name.startswith("base.")
    }
    config = layout_recipe(layout, runs, tiny_blend, runs / "base")
    fields = vars(recipe("idm", runs / layout, tiny_blend, config.start_from, 6, whole=True))
    train_in_process(RunConfig(**fields), resume=True)
    np.testing.assert_allclose(series(runs / layout, "loss"), series(runs / "straight", "loss"), rtol=2e-6)
