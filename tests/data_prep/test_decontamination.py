"""Decontamination finds exactly the documents that share 13 tokens in a row with a prompt, whatever the hashes do."""

import gzip
import json
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from data_prep import decontamination
from data_prep.decontamination import WINDOW_TOKENS, BenchmarkNgrams, HashFilter, read_prompts
from data_prep.errors import InputDataError, UserError

Texts = list[list[int]]
LONG = list(range(100, 100 + WINDOW_TOKENS))


def windows_of(texts: Texts) -> set[tuple[int, ...]]:
    return {
        tuple(text[start : start + WINDOW_TOKENS])
        for text in texts
        for start in range(len(text) - WINDOW_TOKENS + 1)
    }


def contaminated(prompts: Texts, documents: Texts, dtype: type = np.uint32) -> list[bool]:
    tokens: np.ndarray = np.array([*chain.from_iterable(documents)], dtype=dtype)
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    return BenchmarkNgrams(prompts).contaminated(tokens, lengths).tolist()


@st.composite
def prompts_and_documents(draw: st.DrawFn) -> tuple[Texts, Texts]:
    """Texts of few different tokens, so that much is nearly equal; documents hold pieces of prompts, cut anywhere."""
    token = st.integers(0, draw(st.sampled_from([1, 3, 128_255])))
    text = st.lists(token, max_size=40)
    prompts = draw(st.lists(text | st.lists(token, min_size=13, max_size=20), max_size=4))
    pieces = text
    if long := [prompt for prompt in prompts if len(prompt) >= WINDOW_TOKENS]:
        size = st.sampled_from([WINDOW_TOKENS - 1, WINDOW_TOKENS, 40])
        piece = st.tuples(st.sampled_from(long), st.integers(0, 7), size)
        pieces = st.one_of(
            st.lists(token, max_size=9), piece.map(lambda cut: cut[0][cut[1] : cut[1] + cut[2]])
        )
    stream = [token for piece in draw(st.lists(pieces, max_size=8)) for token in piece]
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    documents = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    return prompts, documents


@settings(max_examples=250, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
@given(case=prompts_and_documents())
def agrees_with_sets_of_tuples(case: tuple[Texts, Texts]) -> None:
    prompts, documents = case
    known = windows_of(prompts)
    assert contaminated(prompts, documents) == [bool(windows_of([text]) & known) for text in documents]


def test_exact() -> None:
    agrees_with_sets_of_tuples()


def test_exact_where_all_hashes_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decontamination, "WINDOW_FACTORS", np.zeros(WINDOW_TOKENS, np.uint64))
    agrees_with_sets_of_tuples()


def ignore_borders(anchors: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    everything = decontamination_windows_around(anchors, ends[-1:])
    return everything[0], np.sort(ends.searchsorted(everything[0], side="right"))


decontamination_windows_around = decontamination._windows_around
FAULTS: dict[str, dict[str, object]] = {
    "no comparison of the tokens": {
        "WINDOW_FACTORS": np.zeros(WINDOW_TOKENS, np.uint64),
        "BenchmarkNgrams._are_windows": lambda self, windows, hashes: np.ones(len(windows), bool),
    },
    "only the first of equal hashes is compared": {
        "WINDOW_FACTORS": np.zeros(WINDOW_TOKENS, np.uint64),
        "BenchmarkNgrams._are_windows": lambda self, windows, hashes: (
            decontamination._windows_at(self._tokens, self._starts[:1]) == windows
        ).all(axis=1),
    },
    "windows cross the borders of documents": {"_windows_around": ignore_borders},
    "too few anchors": {"STRIDE_TOKENS": 8},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for target, value in FAULTS[name].items():
        monkeypatch.setattr(f"data_prep.decontamination.{target}", value)
    with pytest.raises(AssertionError):
        agrees_with_sets_of_tuples()


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int64])
@pytest.mark.parametrize("place", range(14))
def test_found_at_every_place_and_in_every_number_type(place: int, dtype: type) -> None:
    noise = list(range(1000, 1000 + place))
    documents = [[7] * 20, [], noise + LONG + [5], LONG[:-1], LONG[1:], noise + LONG[:6] + [9] + LONG[7:]]
    assert contaminated([LONG], documents, dtype) == [False, False, True, False, False, False]


def test_reads_a_buffer_that_is_read_only_and_not_aligned() -> None:
    data = b"x" * 4 + np.array(LONG, dtype=np.uint32).tobytes()
    tokens = np.frombuffer(data, dtype=np.uint32, offset=4)
    assert BenchmarkNgrams([LONG]).contaminated(tokens, np.array([len(LONG)])).tolist() == [True]


def test_filter_keeps_members_and_refuses_nearly_all_others() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
    members, others = hashes[:100_000], hashes[100_000:]
    hash_filter = HashFilter(members)
    assert (hash_filter.possible(members) == np.arange(len(members))).all()
    assert len(hash_filter.possible(others)) < 0.01 * len(others)


def test_fingerprint_is_that_of_the_set_of_windows() -> None:
    other = [token + 1 for token in LONG]
    fingerprint = BenchmarkNgrams([LONG, other]).fingerprint
    assert BenchmarkNgrams([other, [1, 2], LONG, LONG]).fingerprint == fingerprint
    assert BenchmarkNgrams([LONG]).fingerprint != fingerprint
    assert BenchmarkNgrams([LONG, [*other, 5]]).fingerprint != fingerprint
    assert len(fingerprint) == 32


def encode(texts: list[str]) -> Texts:
    return [list(text.encode()) for text in texts]


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data)


def zstandard_frames(data: bytes) -> bytes:
    return b"".join(zstandard.compress(half) for half in (data[:40], data[40:]))


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), (".gz", gzipped), (".zst", zstandard_frames)])
def test_reads_every_field_plain_and_compressed(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    rows: list[dict[str, object]] = [
        {"problem": "A long problem, written out.", "answer": "7", "level": 5},
        {"passage": "A passage of many words; \u4e2d\u6587.", "question": "Short?"},
        {"text": "A long problem, written out.", "prompt": None},
    ]
    path = tmp_path / f"benchmark.jsonl{suffix}"
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(compress(b"\xef\xbb\xbf" + lines.encode()))
    texts = [rows[0]["problem"], rows[1]["question"], rows[1]["passage"], rows[2]["text"]]
    assert list(read_prompts(path)) == texts
    benchmarks = BenchmarkNgrams.from_files([path], encode)
    assert (benchmarks.prompts, benchmarks.short_prompts) == (3, 1)
    documents = encode(
        ["I saw a long problem, written out", "I saw a prob. lem, writ. ten o.ut", "words; \u4e2d\u6587"]
    )
    tokens, lengths = np.array([*chain.from_iterable(documents)]), np.array([len(ids) for ids in documents])
    assert benchmarks.contaminated(tokens, lengths).tolist() == [True, False, True]
    assert benchmarks.windows == len(windows_of(encode([str(text) for text in texts])))


BAD_FILES: dict[str, tuple[bytes, type[UserError], str]] = {
    "no field": (
        b'{"text": "x"}\n{"answer": "7"}\n',
        InputDataError,
        r'row 2 holds no prompt.*"prompt" or "problem"',
    ),
    "no string": (b'{"prompt": 7}\n', InputDataError, "row 1 holds no prompt"),
    "no object": (b'["text"]\n', InputDataError, "row 1 holds no prompt"),
    "no JSON": (b'{"text": "x"}\n\n{"text": \n', InputDataError, "row 3 is not JSON"),
    "no UTF-8": (b'{"text": "\xff"}\n', InputDataError, "row 1 is not JSON"),
    "half a pair": (b'{"text": "\\ud800"}\n', InputDataError, "row 1 holds half of a surrogate pair"),
    "no rows": (b"\n \n", UserError, "has no rows"),
    "too short": (b'{"text": "short"}\n', UserError, "no prompt has 13 tokens"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(tmp_path: Path, name: str) -> None:
    content, kind, message = BAD_FILES[name]
    path = tmp_path / "benchmark.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + message) as caught:
        BenchmarkNgrams.from_files([path], encode)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"benchmark\.jsonl is no file"):
        BenchmarkNgrams.from_files([tmp_path / "benchmark.jsonl"], encode)
    data = zstandard.compress(b'{"text": "a"}\n' * 100)
    for name, damaged in {
        "cut.jsonl.zst": data[:-3],
        "other.jsonl.zst": b"plain",
        "x.jsonl.gz": b"plain",
    }.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputDataError, match=f"{name}: cannot be read"):
            BenchmarkNgrams.from_files([tmp_path / name], encode)
