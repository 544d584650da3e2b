"""Diversity of the continuations of a prompt: self-BLEU and distinct-n on token ids, computed with nltk."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # the usual implementation of BLEU
from nltk.util import ngrams


@dataclass(frozen=True, kw_only=True)
class DiversityFigures:
    """How different continuations of the same prompt are; means over prompts."""

    self_bleu: float
    """BLEU-4 of each continuation against the others, 0 (nothing shared) to 1 (all the same)."""
    distinct_1: float
    """Different tokens / all tokens over the continuations of a prompt, above 0 to 1."""
    distinct_2: float
    """The same for pairs of neighbouring tokens."""


def self_bleu(continuations: Sequence[Sequence[int]]) -> float:
    """Mean BLEU-4 of each continuation with all others as references; needs at least two of them."""
    if len(continuations) < 2:
        raise ValueError(f"self-BLEU compares continuations with each other; got {len(continuations)}")
    # Without smoothing one missing 4-gram would turn a score of nearly 1 into 0.
    smoothing = SmoothingFunction().method1
    scores = []
    for index, hypothesis in enumerate(continuations):
        references = [list(other) for position, other in enumerate(continuations) if position != index]
        scores.append(float(sentence_bleu(references, list(hypothesis), smoothing_function=smoothing)))
    return fmean(scores)


def distinct_n(continuations: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams / all n-grams over a set of continuations."""
    found = [gram for continuation in continuations for gram in ngrams(continuation, n)]
    if not found:
        raise ValueError(f"no continuation has {n} tokens")
    return len(set(found)) / len(found)


def diversity(sets: Sequence[Sequence[Sequence[int]]]) -> DiversityFigures:
    """Figures of `sets` (one set of continuations for each prompt), averaged over the prompts."""
    return DiversityFigures(
        self_bleu=fmean(self_bleu(continuations) for continuations in sets),
        distinct_1=fmean(distinct_n(continuations, 1) for continuations in sets),
        distinct_2=fmean(distinct_n(continuations, 2) for continuations in sets),
    )
