"""A small template grammar: the engine under every generated sample document.

A rule is a list of templates. In a template `{name}` stands for a bound value or another rule, `{this|that
{name}}` for one of several templates, `{^name}` capitalises the first letter and `{a:name}` puts "a" or
"an" before it. Earlier alternatives are drawn more often, as some words are more common than others in
natural text. Templates are compiled once, so that a megabyte of text takes well under a second.
"""

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

CAPITAL_MARK = "^"
ARTICLE_MARK = "a:"

Item = TypeVar("Item")


def skewed_choice(rng: random.Random, items: Sequence[Item]) -> Item:
    """Draw an item, the early ones more often: the first i of n have the probability (i / n) ** (2 / 3)."""
    return items[int(len(items) * rng.random() ** 1.5)]


def with_article(noun: str) -> str:
    """Put the indefinite article that fits the first letter before `noun`."""
    return ("an " if noun[:1].lower() in "aeiou" else "a ") + noun


class Reference:
    """A compiled `{...}`: a name (of a binding or a rule), or the templates of which one is drawn."""

    __slots__ = ("alternatives", "article", "capital", "name")

    def __init__(self, body: str) -> None:
        self.capital = body.startswith(CAPITAL_MARK)
        body = body.removeprefix(CAPITAL_MARK)
        self.article = body.startswith(ARTICLE_MARK)
        self.name = body.removeprefix(ARTICLE_MARK)
        alternatives = split_outside_braces(self.name)
        self.alternatives = [compile_template(text) for text in alternatives] if len(alternatives) > 1 else []


Template = list[str | Reference]


def split_outside_braces(body: str) -> list[str]:
    """Split at the `|` that are not inside a nested brace."""
    pieces, depth = [""], 0
    for character in body:
        depth += (character == "{") - (character == "}")
        if character == "|" and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def compile_template(text: str) -> Template:
    """Split a template into literal texts and references. Raises ValueError for braces that do not pair."""
    template: Template = []
    start = depth = 0
    for position, character in enumerate(text):
        if character == "{":
            if depth == 0 and position > start:
                template.append(text[start:position])
            start = start if depth else position + 1
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                template.append(Reference(text[start:position]))
                start = position + 1
    if depth:
        raise ValueError(f"braces do not pair in the template {text!r}")
    return [*template, text[start:]] if start < len(text) else template


class Grammar:
    """Compiled rules; `expand` draws one text from a rule.

    Raises:
        KeyError: at expansion, when a template names neither a binding nor a rule (a mistake in the rules).
    """

    def __init__(self, rules: Mapping[str, Sequence[str]]) -> None:
        self._rules = {name: [compile_template(text) for text in texts] for name, texts in rules.items()}

    def expand(self, rule: str, rng: random.Random, bindings: Mapping[str, str]) -> str:
        """Draw one text of `rule`; names in `bindings` take precedence over rules of that name."""
        return self._render(skewed_choice(rng, self._rules[rule]), rng, bindings)

    def expand_several(
        self, rule: str, count: int, rng: random.Random, bindings: Mapping[str, str]
    ) -> list[str]:
        """Draw `count` texts from different templates of `rule` (fewer when the rule has fewer templates)."""
        templates = self._rules[rule]
        chosen = rng.sample(templates, min(count, len(templates)))
        return [self._render(template, rng, bindings) for template in chosen]

    def _render(self, template: Template, rng: random.Random, bindings: Mapping[str, str]) -> str:
        output: list[str] = []
        for part in template:
            if isinstance(part, str):
                output.append(part)
                continue
            if part.alternatives:
                text = self._render(skewed_choice(rng, part.alternatives), rng, bindings)
            elif part.name in bindings:
                text = bindings[part.name]
            else:
                text = self._render(skewed_choice(rng, self._rules[part.name]), rng, bindings)
            if part.article:
                text = with_article(text)
            output.append(text[:1].upper() + text[1:] if part.capital else text)
        return "".join(output)
