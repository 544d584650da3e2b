"""The average of checkpoints is their mean, and a checkpoint like any other but for its optimizer."""

import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.average import AverageConfig, MeanOfReaders, average
from checkpoint_tools.formats.megatron_files import CheckedWeights, MegatronWeights
from checkpoint_tools.formats.opened_model import open_model
from checkpoint_tools.formats.tensor_reader import TensorFacts, TensorReader
from data_prep.errors import UserError
from pretrain.checkpoints.checkpoint_folder import (
    find_checkpoints,
    locate_parts,
    read_description,
    start_of,
    step_folder,
)
from pretrain.recipes import recipe_from_fields
from tests.pretrain.tiny_runs import tiny_recipe, train_in_process

STEPS = 3
TRAINED = ("idm", "world_model")


def train(
    stage: str,
    run: Path,
    blend: Path,
    start_from: Path | None = None,
    saved: tuple[int, ...] = (STEPS,),
    **checkpoint: bool,
) -> None:
    """A few steps in BF16; a start for each of those `saved`, since within one a slow disk can put a save off."""
    for steps in saved:
        recipe = tiny_recipe(
            stage,
            run,
            blend,
            start_from,
            training={"steps": steps, "precision": "bf16"},
            optimizer={"learning_rate": 0.1},
            checkpoint=checkpoint,
        )
        train_in_process(recipe, resume=steps > saved[0])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    """base/, idm/ on it, whole/ with self-contained checkpoints, and mean/ of the idm run's three."""
    folder = tmp_path_factory.mktemp("average")
    train("base", folder / "base", tiny_blend)
    train("idm", folder / "idm", tiny_blend, folder / "base", saved=(1, 2, 3))
    train("idm", folder / "whole", tiny_blend, folder / "base", saved=(1, 2, 3), self_contained=True)
    average_of(folder / "idm", output=folder / "mean", last=STEPS)
    return folder


def average_of(*checkpoints: Path, output: Path, **options: Any) -> Path:
    average(AverageConfig(checkpoints=checkpoints, output=output, **options))
    return find_checkpoints(output)[-1]


def read(checkpoint: Path, parts: tuple[str, ...] = TRAINED) -> dict[str, torch.Tensor]:
    """The tensors of `parts`, each held against its recorded fingerprint."""
    description = read_description(checkpoint)
    weights = MegatronWeights(recipe_from_fields(description.recipe, str(checkpoint)), checkpoint, parts)
    checked = CheckedWeights(weights, description.fingerprints, checkpoint)
    return {name: checked.read(name) for name in checked.facts}


def means(checkpoints: list[Path]) -> dict[str, torch.Tensor]:
    """Of the trained tensors, all in memory."""
    every = [read(checkpoint) for checkpoint in checkpoints]
    return {
        name: torch.stack([tensors[name].double() for tensors in every]).mean(0).bfloat16()
        for name in every[0]
    }


def differing(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_every_trained_tensor_is_the_mean(runs: Path) -> None:
    """Bit for bit; the mean of fewer checkpoints, the twin, differs everywhere but in what has not moved."""
    checkpoints = find_checkpoints(runs / "idm")
    (mean,) = find_checkpoints(runs / "mean")
    assert len(checkpoints) == STEPS
    assert differing(read(mean), means(checkpoints)) == []
    assert len(differing(read(mean), means(checkpoints[1:]))) == len(read(mean))


def test_the_checkpoint_is_described_like_the_newest(runs: Path) -> None:
    """All but the fingerprints of the trained tensors; there is no optimizer and no config.yaml."""
    (mean,) = find_checkpoints(runs / "mean")
    newest = find_checkpoints(runs / "idm")[-1]
    ours, theirs = vars(read_description(mean)), vars(read_description(newest))
    fingerprints, others = ours.pop("fingerprints"), theirs.pop("fingerprints")
    assert ours == theirs
    assert fingerprints.keys() == others.keys()
    changed = {name for name in fingerprints if fingerprints[name] != others[name]}
    assert changed == {name for name in fingerprints if name.split(".")[0] in TRAINED}
    assert sorted(path.name for path in mean.iterdir()) == ["cola.json", "weights"]
    assert sorted(path.name for path in mean.parents[1].iterdir()) == ["average.json", "checkpoints"]
    sources = json.loads((runs / "mean" / "average.json").read_text())["mean_of"]
    assert sources == [f"../idm/checkpoints/step_{step:08d}" for step in (1, 2, 3)]


def test_training_starts_from_it(runs: Path, tiny_blend: Path) -> None:
    """A policy on it freezes the averaged tensors; an idm run that begins with it moves away from them."""
    (mean,) = find_checkpoints(runs / "mean")
    train("policy", runs / "policy", tiny_blend, runs / "mean")
    policy = read_description(find_checkpoints(runs / "policy")[-1])
    recorded = read_description(mean).fingerprints
    assert recorded.items() < policy.fingerprints.items()

    begun = tiny_recipe(
        "idm",
        runs / "begun",
        tiny_blend,
        runs / "base",
        training={"steps": 1, "precision": "bf16"},
        optimizer={"learning_rate": 1e-12, "min_learning_rate": 0.0},
    )
    train_in_process(replace(begun, init_from=runs / "mean"))
    for name, tensor in read(
        find_checkpoints(runs / "begun")[-1]
    ).items():  # a zero has moved by the learning rate
        torch.testing.assert_close(tensor, read(mean)[name], rtol=0, atol=1e-11)
    assert differing(read(find_checkpoints(runs / "begun")[-1]), read(find_checkpoints(runs / "idm")[-1]))


def test_everything_reads_it(runs: Path) -> None:
    """Under its Hugging Face names, base and all, held against the fingerprints, which is what an export reads."""
    opened = open_model(runs / "mean")
    assert opened.parts == ("base", *TRAINED)
    assert all(opened.reader.read(name).isfinite().all() for name in opened.reader.facts)


def test_training_is_not_resumed_in_it(runs: Path, tiny_blend: Path) -> None:
    """There is no optimizer state to go on with; the refusal says that the folder is no run's."""
    recipe = tiny_recipe("idm", runs / "mean", tiny_blend, runs / "base", training={"precision": "bf16"})
    for options in ({"resume": True}, {}):
        with pytest.raises(UserError, match=r"mean holds other files and no config.yaml, so it is no run's"):
            train_in_process(recipe, **options)


def test_the_start_is_found_from_anywhere(runs: Path, tmp_path: Path) -> None:
    """Also from a folder that is reached through a link, whose `..` is another folder."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    mean = average_of(runs / "idm", output=tmp_path / "link" / "mean", last=2)
    assert start_of(mean, read_description(mean)) == find_checkpoints(runs / "base")[-1].resolve()
    assert locate_parts(mean)["base"] == find_checkpoints(runs / "base")[-1].resolve()


def test_self_contained_checkpoints_keep_their_frozen_parts(runs: Path, tmp_path: Path) -> None:
    """Bit for bit, inside; so the average needs no other checkpoint either."""
    checkpoints = find_checkpoints(runs / "whole")
    moved = tmp_path / "moved"
    average_of(*checkpoints[1:], output=tmp_path / "mean").parents[1].rename(moved)
    (mean,) = find_checkpoints(moved)
    assert locate_parts(mean) == dict.fromkeys(("base", *TRAINED), mean)
    assert differing(read(mean, ("base",)), read(checkpoints[0], ("base",))) == []
    assert differing(read(mean), means(checkpoints[1:])) == []


class Held:
    """A reader of one tensor that refuses to read while anything it gave out is still held."""

    def __init__(self, tensor: torch.Tensor, given: list[weakref.ref[torch.Tensor]]) -> None:
        self.facts = {"x": TensorFacts(tuple(tensor.shape), tensor.dtype)}
        self._tensor, self._given = tensor, given

    def read(self, name: str) -> torch.Tensor:
        assert all(tensor() is None for tensor in self._given), "an earlier tensor is still in memory"
        tensor = self._tensor.clone()
        self._given.append(weakref.ref(tensor))
        return tensor


def readers_of(tensors: list[torch.Tensor]) -> list[TensorReader]:
    given: list[weakref.ref[torch.Tensor]] = []
    return [Held(tensor, given) for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_equal_tensors_are_their_own_mean(dtype: torch.dtype, count: int) -> None:
    """To the last bit, signs of zero included; summed in the tensor's own type, the twin, they are not always.

    All BF16 numbers whose sum is one, times a factor that needs the precision of fp32.
    """
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    tensor = bits.view(torch.bfloat16).to(dtype) * torch.tensor(1.0 + 2.0**-20, dtype=dtype)
    readers = readers_of([tensor] * count)
    mean = MeanOfReaders(readers, readers[0]).read("x")
    numbers = tensor.abs() < 1e37
    as_bits = torch.int16 if dtype is torch.bfloat16 else torch.int32
    assert torch.equal(mean[numbers].view(as_bits), tensor[numbers].view(as_bits))
    if count > 2:
        assert not torch.equal((sum([tensor] * (count - 1), tensor) / count)[numbers], tensor[numbers])


def test_one_tensor_is_held_at_a_time() -> None:
    """Beside the sum; the twin, which stacks them, holds them all."""
    tensors = [torch.full((3, 1 << 20), float(number)) for number in range(4)]
    readers = readers_of(tensors)
    assert torch.equal(MeanOfReaders(readers, readers[0]).read("x"), torch.full((3, 1 << 20), 1.5))
    with pytest.raises(AssertionError, match="still in memory"):
        torch.stack([reader.read("x") for reader in readers_of(tensors)])


def with_recipe(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda description: description["recipe"].update(changes)


def with_another_base(description: dict[str, Any]) -> None:
    name = next(name for name in description["fingerprints"] if name.startswith("base."))
    description["fingerprints"][name] = "0" * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_recipe(seed=7), r"is of another run than .* \(seed: 42 and 7\)"),
        (lambda d: d["recipe"]["actions"].update(temperature=1.0), r"\(actions.temperature: 2.0 and 1.0\)"),
        (lambda d: d.update(tokenizer_fingerprint="1" * 64), r"\(tokenizer_fingerprint: "),
        (with_another_base, r"stands on other frozen tensors than .* \(1 differ, first base\."),
    ],
)
def test_checkpoints_that_do_not_belong_together_are_refused(
    runs: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    first, other = (
        shutil.copytree(path, tmp_path / path.name) for path in find_checkpoints(runs / "idm")[:2]
    )
    description = json.loads((other / "cola.json").read_text())
    change(description)
    (other / "cola.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=message):
        average_of(first, other, output=tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_bad_choices_are_refused_in_one_line(runs: Path, tmp_path: Path) -> None:
    """Each names the thing; nothing is written."""
    output, idm = tmp_path / "mean", runs / "idm"
    first = find_checkpoints(idm)[0]
    with pytest.raises(UserError, match=r"idm: holds 3 complete checkpoint\(s\), fewer than --last 4"):
        average_of(idm, output=output, last=4)
    with pytest.raises(UserError, match=r"--last 1: a mean needs two checkpoints or more"):
        average_of(idm, output=output, last=1)
    with pytest.raises(UserError, match=r"--last 2 goes with one run folder, not with 2"):
        average_of(idm, first, output=output, last=2)
    with pytest.raises(UserError, match=r"1 checkpoint\(s\) named; a mean needs two or more"):
        average_of(idm, output=output)
    with pytest.raises(UserError, match=r"step_00000003: is named twice"):
        average_of(idm, step_folder(idm, STEPS), output=output)
    with pytest.raises(UserError, match=r"\(stage: idm and base\); "):
        average_of(idm, runs / "base", output=output)
    with pytest.raises(UserError, match=r"idm exists; choose another folder or pass --overwrite"):
        average_of(idm, output=idm, last=2)
    with pytest.raises(UserError, match=r"idm was not written by this command"):
        average_of(idm, output=idm, last=2, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_an_average_can_be_made_again(runs: Path, tmp_path: Path) -> None:
    """--overwrite replaces an earlier one, and nothing else."""
    average_of(runs / "idm", output=tmp_path / "mean", last=2)
    mean = average_of(runs / "idm", output=tmp_path / "mean", last=3, overwrite=True)
    assert differing(read(mean), read(find_checkpoints(runs / "mean")[0])) == []


def test_a_damaged_checkpoint_is_refused(runs: Path, tmp_path: Path) -> None:
    """Its fingerprint tells; what was begun is gone."""
    shutil.copytree(runs / "base", tmp_path / "base")
    damaged = shutil.copytree(runs / "idm", tmp_path / "idm")
    data = read(step_folder(runs / "idm", 2))["idm.head.weight"].view(torch.uint8).numpy().tobytes()
    for file in (step_folder(damaged, 2) / "weights").glob("*.distcp"):
        file.write_bytes(file.read_bytes().replace(data, bytes([data[0] ^ 1]) + data[1:]))
    with pytest.raises(
        UserError, match=r"step_00000002: 1 tensor\(s\) are not what was saved, first idm.head"
    ):
        average_of(damaged, output=tmp_path / "mean", last=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "idm"]
