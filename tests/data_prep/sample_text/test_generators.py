"""The generated text is varied, repeatable, and its numbers are right."""

import itertools
import random
import re
from collections.abc import Callable

import pytest

from data_prep.sample_text import chinese, english, mathematics
from data_prep.sample_text.python_sources import (
    LONGEST_PIECE_CHARACTERS,
    c_headers,
    cut_into_pieces,
    documentation,
    python_modules,
)

ENGLISH = sorted(
    {generator for group in english.SETS.values() for generator in group}, key=lambda g: g.__name__
)
MATHEMATICS = [generator for group in mathematics.SUBSETS.values() for generator in group]
TEXT_GENERATORS = [*ENGLISH, *MATHEMATICS]


@pytest.mark.parametrize("generator", TEXT_GENERATORS, ids=lambda generator: generator.__name__)
def test_documents_are_repeatable_varied_and_finished(generator: Callable[[random.Random], str]) -> None:
    texts = [generator(random.Random(seed)) for seed in range(60)]
    assert texts[7] == generator(random.Random(7))
    assert len(set(texts)) == len(texts)
    assert not [text for text in texts if "{}" in text or "{|" in text or text != text.strip()]


@pytest.mark.parametrize("generator", chinese.GENERATORS, ids=lambda generator: generator.__name__)
def test_chinese_documents(generator: Callable[[random.Random], tuple[str, str]]) -> None:
    pairs = [generator(random.Random(seed)) for seed in range(60)]
    assert pairs[7] == generator(random.Random(7))
    contents = [content for _, content in pairs]
    assert len(set(contents)) == len(contents)
    assert not [content for content in contents if re.search("[{}|]", content)]
    ideographs = sum("\u4e00" <= sign <= "\u9fff" for content in contents for sign in content)
    assert ideographs > 0.5 * sum(map(len, contents))


def wrong_sums(text: str) -> list[str]:
    """Claims like `3 + 4 = 8` in a text that are not true."""
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    return [
        f"{a} {sign} {b} = {c}"
        for a, sign, b, c in re.findall(r"(?<![\d+*-] )\b(\d+) ([-+*/]) (\d+) = (\d+)", text)
        if operations[sign](int(a), int(b)) != int(c)
    ]


@pytest.mark.parametrize(
    "generator", [english.word_problems, mathematics.lean_file], ids=lambda g: g.__name__
)
def test_sums_are_right(generator: Callable[[random.Random], str]) -> None:
    text = "\n".join(generator(random.Random(seed)) for seed in range(100))
    assert re.search(r"\d+ [-+*/] \d+ = \d+", text)
    assert wrong_sums(text) == []
    assert wrong_sums(text + " 3 + 4 = 8") == ["3 + 4 = 8"]  # the check itself can fail


def test_bills_add_up() -> None:
    for seed in range(50):
        text = english.dialogue(random.Random(seed))
        items = re.findall(r", (\d+) of them.*\n.* At (\d+) euros each, that makes (\d+) euros", text)
        assert all(int(count) * int(price) == int(cost) for count, price, cost in items)
        closing = re.search(r"(\d+) minus (\d+) is (\d+)", text)
        assert closing is not None
        paid, total, change = map(int, closing.groups())
        assert total == sum(int(cost) for *_, cost in items)
        assert paid - total == change >= 0


def test_roots_solve_their_equation() -> None:
    for seed in range(200):
        problem, solution = mathematics.quadratic_equation(random.Random(seed))
        variable = problem[len("Solve $")]
        expression = problem[len("Solve $") : -len(" = 0$.")].replace("^", "**")
        expression = re.sub(rf"(\d){variable}", rf"\1*{variable}", expression)
        roots = re.findall(rf"{variable} = (-?\d+)\$", solution.splitlines()[-1])
        assert roots
        assert [eval(expression, {variable: int(root)}) for root in roots] == [0] * len(roots)


def test_derivatives_have_the_right_value() -> None:
    for seed in range(200):
        problem, solution = mathematics.derivative(random.Random(seed))
        match = re.search(r"\(x\) = (.*)\$ at \$x = (-?\d+)\$", problem)
        claim = re.search(r"'\(-?\d+\) = (-?\d+)\$", solution)
        assert match is not None
        assert claim is not None
        expression = re.sub(r"(\d)x", r"\1*x", match[1]).replace("^", "**")
        point, step = int(match[2]), 1e-4
        slope = (eval(expression, {"x": point + step}) - eval(expression, {"x": point - step})) / (2 * step)
        assert slope == pytest.approx(int(claim[1]), abs=0.01)


def test_pieces_of_a_module_make_the_module() -> None:
    text = "".join(f"def function_{number}():\n    return {number}\n\n" for number in range(2000))
    pieces = list(cut_into_pieces(text))
    assert len(pieces) > 2
    assert "".join(pieces) == text
    assert all(piece.startswith("def ") for piece in pieces)
    assert max(map(len, pieces)) < LONGEST_PIECE_CHARACTERS + 100


def test_real_text_of_the_installation() -> None:
    modules = list(itertools.islice(python_modules(random.Random(0)), 20))
    assert all(path.endswith(".py") and text.strip() for path, text in modules)
    assert modules == list(itertools.islice(python_modules(random.Random(0)), 20))
    assert all(path.endswith(".h") for path, _ in c_headers(random.Random(0)))
    assert len(next(documentation(random.Random(0)))) > 50
