"""The plan: right amounts in every shard, every document as often as planned, a function of its inputs."""

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.blending import cuts, gather, sources
from data_prep.blending import plan as plan_module
from data_prep.blending.cuts import Cuts, find_cuts
from data_prep.blending.gather import Documents, ShardGroup, groups_of_shards
from data_prep.blending.keys import document_keys, key_stream, random_order
from data_prep.blending.plan import BlendPlan, SourcePlan, load_source, make_plan
from data_prep.blending.sources import SourceSplit, check_units, scan_documents
from data_prep.errors import UserError
from data_prep.indexed_shards import HEADER, idx_path, manifest_path
from data_prep.text_tokenizer import load_tokenizer
from tests.data_prep.token_sources import (
    make_tokenizer,
    make_world,
    random_documents,
    write_source,
    write_unit,
)

GOLDEN_STREAM = 3338373144742194149
GOLDEN_KEYS = [8108049046606654902, 10570019035532130157, 3394689681688904798]
GOLDEN_ORDER = [2, 4, 0, 3, 6, 1, 7, 5]

UnitLengths = list[list[int]]
Written = list[tuple[int, int, int]]  # (unit, offset, length) of each document


def index_only(folder: Path, units: UnitLengths, source: str = "source") -> SourceSplit:
    """A split of which only what a scan reads is on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, lengths in enumerate(units):
        idx_path(folder / str(number)).write_bytes(bytes(HEADER.size) + np.array(lengths, np.int32).tobytes())
    return SourceSplit(
        source=source,
        folder=folder,
        units=[str(number) for number in range(len(units))],
        unit_documents=np.array([len(lengths) for lengths in units], np.int64),
        unit_tokens=np.array([sum(lengths) for lengths in units], np.int64),
        content=json.dumps(units),
    )


def make_blend_plan(
    splits: list[SourceSplit], wanted: list[int], shard_count: int, seed: int = 0
) -> BlendPlan:
    return BlendPlan(
        seed=seed,
        shard_count=shard_count,
        train={
            split.source: SourcePlan(split=split, weight=0.5, tokens_wanted=tokens)
            for split, tokens in zip(splits, wanted, strict=True)
        },
        validation={split.source: split for split in splits},
        validation_tokens=20,
        tokenizer_fingerprint="f",
        dtype=np.dtype(np.uint16),
    )


def written(documents: Documents) -> Written:
    return list(
        zip(
            documents.units.tolist(),
            documents.offsets_tokens.tolist(),
            documents.lengths_tokens.tolist(),
            strict=True,
        )
    )


def planned_shards(plan: BlendPlan, shards: list[int] | None = None) -> list[Written]:
    """The documents of each shard in the order of writing, as the blend finds them."""
    streams, found = plan.train_streams(), {}
    for together in groups_of_shards(streams, range(plan.shard_count) if shards is None else shards):
        group = ShardGroup(streams, together)
        for shard in together:
            found[shard] = written(
                group.in_written_order(shard, plan.written_order(plan.train_prefix(shard)))
            )
    return [found[shard] for shard in sorted(found)]


def reference_shards(plan: BlendPlan) -> list[Written]:
    """The same, by sorting everything with Python's own numbers."""
    shards: list[Written] = [[] for _ in range(plan.shard_count)]
    first_unit = 0
    for name, source in plan.train.items():
        units = [
            [(first_unit + stretch.unit, *place) for place in places_of(stretch.lengths_tokens.tolist())]
            for stretch in scan_documents(source.split)
        ]
        documents = [document for unit in units for document in unit]
        wanted, start, epoch = source.tokens_wanted, 0, 0
        while start < wanted:
            keys = document_keys(
                key_stream(plan.seed, "train", name, "epoch", epoch), 0, len(documents)
            ).tolist()
            shard_of = {}
            for number in sorted(range(len(documents)), key=keys.__getitem__):
                middle = 2 * start + documents[number][2]
                start += documents[number][2]
                for shard in range(plan.shard_count):
                    low, high = (2 * wanted * i // plan.shard_count for i in (shard, shard + 1))
                    if low <= middle < high:
                        shard_of[number] = shard
            for number in sorted(shard_of):
                shards[shard_of[number]].append(documents[number])
            epoch += 1
        first_unit += len(source.split.units)
    return [
        [
            shard[place]
            for place in random_order(plan.written_order(plan.train_prefix(number)), len(shard)).tolist()
        ]
        for number, shard in enumerate(shards)
    ]


def places_of(lengths: list[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    return [(end - length, length) for end, length in zip(ends, lengths, strict=True)]


unit_lengths = st.lists(st.lists(st.integers(1, 50), max_size=25), min_size=1, max_size=4).filter(
    lambda units: sum(map(len, units)) > 0
)


@settings(max_examples=150, deadline=None)
@given(
    units=st.tuples(unit_lengths, unit_lengths),
    shares=st.tuples(st.floats(0.05, 3.0), st.floats(0.05, 3.0)),
    shard_count=st.integers(1, 7),
    seed=st.integers(0, 5),
    bits=st.integers(1, 12),
    group=st.integers(1, 60),
)
def test_plan_is_the_one_that_sorts_everything(
    tmp_path_factory: pytest.TempPathFactory,
    units: tuple[UnitLengths, UnitLengths],
    shares: tuple[float, float],
    shard_count: int,
    seed: int,
    bits: int,
    group: int,
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    splits = [index_only(folder / name, part, name) for name, part in zip("ab", units, strict=True)]
    wanted = [max(1, round(share * split.tokens)) for share, split in zip(shares, splits, strict=True)]
    plan = make_blend_plan(splits, wanted, shard_count, seed)
    expected = reference_shards(plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "MAX_BIN_BITS", bits)  # many documents in a bin
        patch.setattr(gather, "GROUP_DOCUMENTS", group)
        patch.setattr(sources, "STRETCH_DOCUMENTS", 7)
        assert planned_shards(plan) == expected
        part = [shard for shard in range(shard_count) if shard % 3 != 1]
        assert planned_shards(plan, part) == [expected[shard] for shard in part]
    check_amounts(plan, expected)


def check_amounts(plan: BlendPlan, shards: list[Written]) -> None:
    """Each shard has its part of each source up to a document, and no document is used too often."""
    first_unit = 0
    for source in plan.train.values():
        units = range(first_unit, first_unit + len(source.split.units))
        first_unit = units.stop
        parts = [[document for document in shard if document[0] in units] for shard in shards]
        longest = max(stretch.lengths_tokens.max() for stretch in scan_documents(source.split))
        tokens = [sum(length for _, _, length in part) for part in parts]
        assert abs(sum(tokens) - source.tokens_wanted) <= (longest + 1) / 2
        assert all(abs(amount - source.tokens_wanted / plan.shard_count) <= longest + 1 for amount in tokens)
        counts = Counter(document for part in parts for document in part)
        repeats = list(counts.values()) + [0] * (source.split.documents - len(counts))
        assert max(repeats) - min(repeats) <= 1


@pytest.mark.parametrize("fault", ["rule", "key"])
def test_a_wrong_cut_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    plan = make_blend_plan([index_only(tmp_path, [[9, 30, 4, 17, 50, 3] * 5, [8] * 9])], [500], 5)
    expected = reference_shards(plan)
    assert planned_shards(plan) == expected

    def wrong_cuts(
        split: SourceSplit, stream: np.uint64, places: np.ndarray, advance: Callable[[int], object] | None
    ) -> Cuts:
        cuts = find_cuts(split, stream, places, whole_last_document=fault == "rule")
        if fault == "key":
            cuts.keys[2] += np.uint64(1)
        return cuts

    monkeypatch.setattr(plan_module, "find_cuts", wrong_cuts)
    with pytest.raises(AssertionError):
        assert planned_shards(plan) == expected


def test_exactly_all_documents_when_all_tokens_are_wanted(tmp_path: Path) -> None:
    split = index_only(tmp_path, [list(range(1, 100)), [], list(range(100, 200))])
    everything = [
        (unit, *place)
        for unit, lengths in ((0, range(1, 100)), (2, range(100, 200)))
        for place in places_of(list(lengths))
    ]
    shards = planned_shards(make_blend_plan([split], [split.tokens], 5))
    assert sorted(document for shard in shards for document in shard) == everything
    shards = planned_shards(make_blend_plan([split], [2 * split.tokens], 3))
    assert sorted(document for shard in shards for document in shard) == sorted(everything * 2)


def test_order_is_a_function_of_the_seed(tmp_path: Path) -> None:
    splits = [index_only(tmp_path / name, [[3, 5, 8, 2] * 25], name) for name in ("one", "two")]

    def plan(seed: int = 0, shard_count: int = 4) -> BlendPlan:
        return make_blend_plan(splits, [split.tokens for split in splits], shard_count, seed)

    first, again, other = planned_shards(plan()), planned_shards(plan()), planned_shards(plan(seed=1))
    assert first == again
    assert first != other
    assert Counter(chain.from_iterable(first)) == Counter(chain.from_iterable(other))
    assert plan().fingerprint == plan().fingerprint
    assert len({plan().fingerprint, plan(seed=1).fingerprint, plan(shard_count=3).fingerprint}) == 3


def test_order_is_shuffled_within_and_between_sources(tmp_path: Path) -> None:
    splits = [index_only(tmp_path / name, [[3, 5, 8, 2] * 250], name) for name in ("one", "two")]
    shards = planned_shards(make_blend_plan(splits, [split.tokens for split in splits], 4))
    sources, offsets, _ = (np.array(column) for column in zip(*shards[0], strict=True))
    assert 0.4 < np.mean(np.diff(sources) != 0) < 0.6  # half of the neighbours are of different sources
    assert abs(np.corrcoef(np.arange(len(offsets)), offsets)[0, 1]) < 0.15
    total = splits[0].tokens
    assert 0.4 < np.mean([offset for _, offset, _ in shards[0] + shards[1]]) / total < 0.6


def test_weights_of_every_shard_are_kept_within_a_thousandth(tmp_path: Path) -> None:
    weights = {"a": 0.1, "b": 0.6, "c": 0.3}
    lengths = np.random.default_rng(0).integers(1, 100, (3, 20_000))
    splits = [
        index_only(tmp_path / name, [part[:3000].tolist(), part[3000:].tolist()], name)
        for name, part in zip(weights, lengths, strict=True)
    ]
    wanted = [round(1_500_000 * weight) for weight in weights.values()]
    tokens = np.array(
        [
            [sum(length for unit, _, length in shard if unit // 2 == source) for source in range(3)]
            for shard in planned_shards(make_blend_plan(splits, wanted, 5))
        ]
    )
    for shares in tokens / tokens.sum(axis=1, keepdims=True):
        assert np.abs(shares - list(weights.values())).max() < 0.001


def test_two_epochs_have_different_orders(tmp_path: Path) -> None:
    split = index_only(tmp_path, [[4] * 100])
    first, second = planned_shards(make_blend_plan([split], [2 * split.tokens], 2))
    assert sorted(first) == sorted(second)
    assert first != second
    streams = [key_stream(0, "train", "source", "epoch", epoch) for epoch in (0, 1)]
    orders = [random_order(stream, 1000) for stream in streams]
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.15


def test_keys_are_the_same_on_every_machine() -> None:
    # Written down once: with other keys a blend would be another one.
    stream = key_stream(0, "train", "slimpajama", "epoch", 0)
    assert int(stream) == GOLDEN_STREAM
    assert document_keys(stream, 0, 3).tolist() == GOLDEN_KEYS
    assert document_keys(stream, 1, 2).tolist() == GOLDEN_KEYS[1:]
    assert random_order(key_stream(0, "shard", "train/shard_00000"), 8).tolist() == GOLDEN_ORDER
    # The first numbers of splitmix64 from 0, as its authors publish them.
    assert document_keys(np.uint64(0), 0, 2).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_streams_of_different_names_differ() -> None:
    names = [(0, "a"), (0, "b"), (1, "a"), ("0 a",), (0, "a", "")]
    assert len({int(key_stream(*name)) for name in names}) == len(names)


def test_keys_are_spread_evenly() -> None:
    keys = document_keys(key_stream(0, "spread"), 0, 1 << 16)
    assert len(np.unique(keys)) == len(keys)
    counts = np.bincount((keys >> np.uint64(58)).astype(np.int64), minlength=64)
    assert abs(counts - 1024).max() < 5 * 32  # five standard deviations


def test_validation_is_capped_and_whole_documents(tmp_path: Path) -> None:
    split = index_only(tmp_path, [[3, 5, 8, 2] * 25])

    def chosen(tokens: int) -> Written:
        plan = make_blend_plan([split], [1], 1)
        object.__setattr__(plan, "validation_tokens", tokens)
        return written(ShardGroup([plan.validation_stream("source")], [0]).in_written_order(0, np.uint64(0)))

    for tokens in range(1, 40):
        assert tokens <= sum(length for _, _, length in chosen(tokens)) < tokens + 8
    assert len(chosen(10**9)) == 100


def test_a_source_is_read_from_its_manifests_alone(tmp_path: Path) -> None:
    config = make_world(tmp_path)
    for path in config.tokenized.rglob("*.idx"):
        path.unlink()
    plan = make_plan(
        tokenized=config.tokenized,
        tokenizer=load_tokenizer(config.tokenizer),
        weights={"wudao": 3.0, "starcoder": 1.0, "slimpajama": 0.0},
        total_tokens=1000,
        shard_tokens=300,
        validation_tokens=10,
        seed=0,
        allow_repeats=False,
    )
    assert plan.shard_count == 3
    assert {name: source.tokens_wanted for name, source in plan.train.items()} == {
        "wudao": 750,
        "starcoder": 250,
    }


def test_units_made_differently_are_refused(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder)
    units = {"a": random_documents(0, [5]), "b": random_documents(1, [5])}
    write_source(tmp_path, "own", folder, units, {"c": random_documents(2, [5])})
    assert load_source(tmp_path / "own", "own", tokenizer)["train"].documents == 2
    for split, unit in (("train", "b"), ("validation", "c")):
        write_unit(tmp_path / "own", "own", split, unit, units["a"], tokenizer, {"text_field": "body"})
        with pytest.raises(
            UserError, match=rf"{unit}\.json: made with another text_field .* tokenize own again"
        ):
            load_source(tmp_path / "own", "own", tokenizer)
        write_unit(tmp_path / "own", "own", split, unit, units["a"], tokenizer)
    for path_of in (manifest_path, idx_path):  # a swapped unit
        path_of(tmp_path / "own/train/a").write_bytes(path_of(tmp_path / "own/train/b").read_bytes())
    with pytest.raises(UserError, match=r"a\.json: is of own/train/b; .* --overwrite"):
        load_source(tmp_path / "own", "own", tokenizer)


def test_an_index_that_does_not_fit_its_manifest_is_refused(tmp_path: Path) -> None:
    split = index_only(tmp_path, [[3, 4], [5, 6]])
    for lengths in ([5, 7], [5], [12, -1], [11, 0]):
        index_only(tmp_path, [[3, 4], lengths])
        with pytest.raises(UserError, match=r"1\.idx does not hold what its manifest says; tokenize source"):
            list(scan_documents(split))
    with pytest.raises(UserError, match=r"0\.idx is not a Megatron index"):
        check_units(split)


def test_memory_does_not_grow_with_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting takes the same memory for four times the documents, and a group 18 bytes for each of its own."""
    monkeypatch.setattr(cuts, "MAX_BIN_BITS", 16)  # as many bins for either, as there are from 2^20 on

    def peak_bytes(units: int) -> tuple[int, int]:
        lengths = np.random.default_rng(0).integers(1, 2000, 50_000).tolist()
        split = index_only(tmp_path / str(units), [lengths] * units)
        plan = make_blend_plan([split], [split.tokens], 20)
        tracemalloc.start()
        streams = plan.train_streams()
        cut_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        group = ShardGroup(streams, range(20))
        group.in_written_order(0, np.uint64(0))
        group_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return cut_bytes, group_bytes

    few_cut, few_group = peak_bytes(10)
    many_cut, many_group = peak_bytes(40)
    more_documents = 30 * 50_000
    assert many_cut - few_cut < 1 * more_documents
    assert many_cut < 10_000_000
    assert many_group - few_group < 20 * more_documents
