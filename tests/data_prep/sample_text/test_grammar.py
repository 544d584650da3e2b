"""Laws of the template grammar."""

import random

import pytest

from data_prep.sample_text.grammar import Grammar, skewed_choice, with_article


def test_bindings_rules_alternatives_articles_and_capitals() -> None:
    grammar = Grammar({"start": ["{^who} saw {a:thing} and {this|that {thing}}."], "thing": ["owl"]})
    texts = {grammar.expand("start", random.Random(seed), {"who": "anna"}) for seed in range(20)}
    assert texts == {"Anna saw an owl and this.", "Anna saw an owl and that owl."}


def test_expand_several_uses_each_template_once() -> None:
    grammar = Grammar({"line": ["a", "b", "c"]})
    assert sorted(grammar.expand_several("line", 5, random.Random(0), {})) == ["a", "b", "c"]


def test_early_items_are_drawn_more_often() -> None:
    rng = random.Random(0)
    draws = [skewed_choice(rng, "abcd") for _ in range(4000)]
    counts = [draws.count(letter) for letter in "abcd"]
    assert counts == sorted(counts, reverse=True)
    assert counts[3] > 400


def test_unpaired_braces_are_refused() -> None:
    with pytest.raises(ValueError, match="do not pair"):
        Grammar({"start": ["{open"]})


def test_articles() -> None:
    assert (with_article("owl"), with_article("box")) == ("an owl", "a box")
