"""Folders of safetensors: what is written is read by us, by the library and by transformers.

And memory: one tensor, however large the folder.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_tools.formats.safetensors_files import (
    INDEX_NAME,
    open_safetensors,
    plan_shards,
    write_safetensors,
)
from checkpoint_tools.formats.tensor_reader import TensorFacts
from data_prep.checksum_list import CHECKSUM_LIST
from data_prep.errors import IntegrityError
from tests.checkpoint_tools.formats.safetensors_folders import (
    FACTS,
    MIB,
    NAMES,
    TensorsInMemory,
    bits,
    random_tensor,
    read_all,
    write,
)

ROOT = Path(__file__).resolve().parents[3]


@given(st.dictionaries(NAMES, FACTS, max_size=6), st.integers(20, 300))
@settings(max_examples=15, deadline=None)
def test_what_is_written_is_read_by_us_and_by_the_library(
    tmp_path_factory: pytest.TempPathFactory, facts: dict[str, TensorFacts], shard_bytes: int
) -> None:
    tensors = {name: random_tensor(fact) for name, fact in facts.items()}
    folder = write(tmp_path_factory.mktemp("round") / "trip", tensors, shard_bytes)
    source = open_safetensors(folder)
    assert source.notices == []
    assert bits({name: source.read(name) for name in source.facts}) == bits(tensors)
    by_library = [load_file(path) for path in folder.glob("*.safetensors")]
    assert bits({name: value for shard in by_library for name, value in shard.items()}) == bits(tensors)
    assert source.check_files(progress=False).unchecked_shards == ()


@given(st.dictionaries(NAMES, FACTS), st.integers(1, 300))
@settings(deadline=None)
def test_plan_keeps_order_and_bounds(facts: dict[str, TensorFacts], shard_bytes: int) -> None:
    names = sorted(facts)
    plan = plan_shards(facts, names, shard_bytes)
    position = {name: number for number, name in enumerate(names)}
    dealt = [sorted(shard, key=position.__getitem__) for shard in plan.values()]
    assert [name for shard in dealt for name in shard] == names
    sizes = [sum(fact.bytes for fact in shard.values()) for shard in plan.values()]
    for shard, size, following in zip(dealt, sizes, [*dealt[1:], []], strict=True):
        assert size <= shard_bytes or sum(facts[name].bytes > 0 for name in shard) == 1
        if following:  # it did not fit
            assert size + facts[following[0]].bytes > shard_bytes
    for tensors in plan.values():
        offset = 0
        for fact in tensors.values():
            assert offset % fact.dtype.itemsize == 0
            offset += fact.bytes


def test_one_file_is_byte_for_byte_the_library_s(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3, 5).to(torch.bfloat16) for name in ("a.bias", 'b"\n\x1f', "c\u00e9", "d")}
    folder = write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    theirs = (tmp_path / "theirs.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == theirs
    assert sorted(path.name for path in folder.iterdir()) == [CHECKSUM_LIST, "model.safetensors"]


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def test_transformers_loads_our_folder_and_we_theirs(tmp_path: Path) -> None:
    model = small_llama()
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model.save_pretrained(theirs, max_shard_size="5KB")
    source = open_safetensors(theirs)
    assert source.notices == [] and len(list(theirs.glob("*.safetensors"))) > 2
    assert bits({name: source.read(name) for name in source.facts}) == bits(model.state_dict())

    ours.mkdir()
    write_safetensors(ours, source, list(source.facts), 5_000, progress=False)
    shutil.copyfile(theirs / "config.json", ours / "config.json")
    assert bits(LlamaForCausalLM.from_pretrained(ours).state_dict()) == bits(model.state_dict())
    their_index, our_index = (json.loads((folder / INDEX_NAME).read_text()) for folder in (theirs, ours))
    assert our_index["metadata"] == their_index["metadata"]
    assert our_index["weight_map"].keys() == their_index["weight_map"].keys()
    with safe_open(ours / "model-00001-of-00005.safetensors", "pt") as shard:
        assert shard.metadata() == {"format": "pt"}


def test_a_changed_weight_is_seen_by_transformers(tmp_path: Path) -> None:
    model = small_llama()
    state = model.state_dict()
    folder = write(tmp_path / "model", state | {"model.norm.weight": 2 * state["model.norm.weight"]})
    model.config.save_pretrained(folder)
    assert bits(LlamaForCausalLM.from_pretrained(folder).state_dict()) != bits(state)


def test_cast_is_for_floating_point_only(tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(1500, 1500), "none": torch.ones(0, 3), "ids": torch.arange(7)}
    tmp_path /= "cast"
    tmp_path.mkdir()
    reader = TensorsInMemory(tensors)
    write_safetensors(tmp_path, reader, list(tensors), MIB, dtype=torch.bfloat16, progress=False)
    cast = {**tensors, "weight": tensors["weight"].bfloat16(), "none": tensors["none"].bfloat16()}
    assert bits(read_all(tmp_path)) == bits(cast)


def test_a_part_can_be_written_in_another_order(tmp_path: Path) -> None:
    reader = TensorsInMemory({name: torch.ones(2) for name in "abc"})
    write_safetensors(tmp_path, reader, ["c", "a"], MIB, progress=False)
    assert list(open_safetensors(tmp_path).facts) == ["c", "a"]


@pytest.mark.parametrize("value", [torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64)])
def test_a_reader_that_breaks_its_word_is_stopped(tmp_path: Path, value: torch.Tensor) -> None:
    reader = TensorsInMemory({"w": value})
    reader.facts = {"w": TensorFacts((2, 3), torch.float32)}
    with pytest.raises(
        IntegrityError, match=r"w: was to be torch.float32 \[2, 3\], but reads as torch.float"
    ):
        write_safetensors(tmp_path, reader, ["w"], MIB, progress=False)


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        write_safetensors(tmp_path, TensorsInMemory({"w": torch.ones(1 << 20)}), ["w"], MIB, progress=False)
    assert caught.value.errno == errno.ENOSPC


# Copies a folder and prints by how many MiB that raised the peak of memory; the twin holds on to what it reads.
COPY = """
import sys
from pathlib import Path
import torch
from checkpoint_tools.formats.safetensors_files import open_safetensors, write_safetensors

def memory_mib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

folder, output = Path(sys.argv[1]), Path(sys.argv[2])
source = open_safetensors(folder)
write_safetensors(output, source, ["small"], 1, dtype=torch.bfloat16, progress=False)  # loads what is loaded once
names = [name for name in source.facts if name != "small"]
if sys.argv[3] == "hoard":
    read, hoard = source.read, []
    source.read = lambda name: hoard.append(read(name)) or hoard[-1]
Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew
before = memory_mib("VmRSS:")
write_safetensors(output, source, names, 30 << 20, dtype=torch.bfloat16, progress=False)
print(memory_mib("VmHWM:") - before)
"""


def test_memory_is_two_tensors(tmp_path: Path) -> None:
    tensors = {str(number): torch.ones(8 * MIB // 2, dtype=torch.float16) for number in range(10)}
    folder = write(tmp_path / "model", {**tensors, "small": torch.ones(8, 8)}, 30 * MIB)
    # What is freed goes back to the system, else the allocator's own habits are measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peaks_mib = {}
    for way in ("stream", "hoard"):
        output = tmp_path / way
        output.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", COPY, str(folder), str(output), way],
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        peaks_mib[way] = float(done.stdout)
    assert peaks_mib["stream"] < 2 * 8 + 3 * 4 + 4  # two tensors, three blocks of a cast, and the interpreter
    assert peaks_mib["hoard"] > 75
