"""The comparison of two runs sees the smallest difference there is, and no other."""

import json
import shutil
from pathlib import Path

import pytest

from data_prep.output_files import write_json_whole
from pretrain.checkpoints.checkpoint_folder import newest_checkpoint
from soak.comparison import differences
from tests.pretrain.tiny_runs import saved_tensors


@pytest.fixture
def copied_run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained_run, tmp_path / "copy"))


def test_a_copy_is_equal_but_for_times(trained_run: Path, copied_run: Path) -> None:
    metrics = copied_run / "metrics.jsonl"
    lines = [json.loads(line) | {"elapsed_seconds": 1e6} for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(trained_run, copied_run) == []


@pytest.mark.parametrize("kind", ["weights", "optimizer"])
def test_one_bit_of_a_tensor_is_seen(trained_run: Path, copied_run: Path, kind: str) -> None:
    """The lowest bit of one number: the smallest change of a tensor."""
    name, tensor = max(
        (
            (n, t)
            for n, t in saved_tensors(trained_run).items()
            if n.startswith(kind) and t.is_floating_point()
        ),
        key=lambda item: item[1].numel(),
    )
    content = tensor.reshape(-1).numpy().tobytes()[:64]
    checkpoint = newest_checkpoint(copied_run)
    assert checkpoint is not None
    (file,) = [path for path in (checkpoint / kind).glob("*.distcp") if content in path.read_bytes()]
    written = bytearray(file.read_bytes())
    written[written.index(content)] ^= 1
    file.write_bytes(written)
    found = differences(trained_run, copied_run)
    assert len(found) == 1 and found[0].startswith(f"checkpoint: {kind}"), (name, found)


def test_one_metric_is_seen(trained_run: Path, copied_run: Path) -> None:
    metrics = copied_run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[2]["loss"] *= 1 + 2**-52
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(trained_run, copied_run) == ["metrics: line 3 differs"]


def test_a_missing_line_of_metrics_is_seen(trained_run: Path, copied_run: Path) -> None:
    metrics = copied_run / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert any("only in the reference" in line for line in differences(trained_run, copied_run))


def test_another_position_in_the_data_is_seen(trained_run: Path, copied_run: Path) -> None:
    checkpoint = newest_checkpoint(copied_run)
    assert checkpoint is not None
    description = json.loads((checkpoint / "cola.json").read_text())
    write_json_whole(
        checkpoint / "cola.json", description | {"consumed_samples": description["consumed_samples"] + 1}
    )
    assert differences(trained_run, copied_run) == ["cola.json: consumed_samples differs"]
