"""Mathematical sample documents: worked algebra, article sections in LaTeX, formal proofs, questions.

All numbers are computed: equations are built from their solutions, derivatives and sums are right, and a
formal proof uses the names that it introduced.
"""

import math
import random
from collections.abc import Callable

from data_prep.sample_text import english_words as words
from data_prep.sample_text.grammar import Grammar, skewed_choice

Generator = Callable[[random.Random], str]
Exercise = tuple[str, str]  # the problem, its solution

SPACES = [
    "Banach space",
    "Hilbert space",
    "metric space",
    "compact manifold",
    "finite group",
    "vector space",
    "topological space",
    "commutative ring",
    "graph",
    "probability space",
]
PROPERTIES = [
    "bounded",
    "continuous",
    "compact",
    "finite",
    "separable",
    "complete",
    "convex",
    "measurable",
    "closed",
    "connected",
    "linear",
    "smooth",
]
PROSE = Grammar(
    {
        "space": SPACES,
        "property": PROPERTIES,
        "surname": words.SURNAMES,
        "letter": ["X", "Y", "E", "G", "M", "V"],
        "map": ["f", "g", "T", "\\varphi", "\\pi"],
        "number_set": ["\\mathbb{R}", "\\mathbb{N}", "\\mathbb{C}", "\\mathbb{Z}"],
        "sentence": [
            "Let ${letter}$ be {a:property} {space} and let ${map}$ be {a:property} map.",
            "We {show|prove|recall|claim} that every {property} {space} is {property}.",
            "This {generalises|improves|extends} a {result|theorem|bound} of {surname} and {surname}.",
            "{The proof|The argument|This} is based on {induction|compactness|a counting argument|duality}.",
            "It is {well known|easy to see|not known} {that|whether} ${map}$ is {property}.",
            "Suppose, on the contrary, that ${map}$ is not {property}.",
            "By {Lemma|Theorem|Proposition} {number}, the {space} ${letter}$ is {property}.",
            "Hence ${map}$ is {property}, {which is a contradiction|as desired|and the claim follows}.",
            "The case of {a:property} {space} is {similar|harder|open|left to the reader}.",
            "We write $|{letter}|$ for the {size|dimension|norm|diameter} of ${letter}$.",
        ],
        "number": [str(number) for number in range(1, 10)],
        "heading": [
            "Introduction",
            "Preliminaries",
            "Main result",
            "Proof of Theorem {number}",
            "An example",
            "Open problems",
            "Notation",
            "The {property} case",
            "Applications",
        ],
        "title": [
            "On {property} {space}s",
            "A note on {a:property} {space}",
            "{^property} maps between {space}s",
            "A bound for {property} {space}s",
            "The {surname} conjecture for {space}s",
        ],
    }
)


def term(coefficient: int, variable: str) -> str:
    """A term with its sign, for the middle of a sum: `- 3x`, `+ x`, empty for 0."""
    size = "" if abs(coefficient) == 1 and variable else str(abs(coefficient))
    return f" {'-' if coefficient < 0 else '+'} {size}{variable}" if coefficient else ""


def polynomial(coefficients: list[int], variable: str) -> str:
    """A polynomial, highest power first; `coefficients` likewise, the first not 0."""
    degree = len(coefficients) - 1
    powers = {0: "", 1: variable}
    terms = [term(c, powers.get(degree - i, f"{variable}^{degree - i}")) for i, c in enumerate(coefficients)]
    text = "".join(terms)
    return "-" + text.removeprefix(" - ") if coefficients[0] < 0 else text.removeprefix(" + ")


def signed(number: int) -> str:
    """A number in brackets when it is negative."""
    return f"({number})" if number < 0 else str(number)


def linear_equation(rng: random.Random) -> Exercise:
    """Solve a x + b = c step by step."""
    variable, solution = rng.choice("xyztn"), rng.randint(-12, 12)
    factor, offset = rng.randint(2, 12), rng.choice([-1, 1]) * rng.randint(1, 40)
    right = factor * solution + offset
    move = f"{'subtract' if offset > 0 else 'add'} {abs(offset)} on both sides"
    return f"Solve ${factor}{variable}{term(offset, '')} = {right}$ for ${variable}$.", (
        f"We {move}: ${factor}{variable} = {right - offset}$. "
        f"Dividing by ${factor}$ gives ${variable} = {solution}$.\n"
        f"Check: ${factor} \\cdot {signed(solution)}{term(offset, '')} = {right}$."
    )


def quadratic_equation(rng: random.Random) -> Exercise:
    """Solve a quadratic equation with integer roots, by the formula or by factoring."""
    variable, first, second = rng.choice("xyzt"), rng.randint(-9, 9), rng.randint(-9, 9)
    b, c = -(first + second), first * second
    equation = polynomial([1, b, c], variable)
    if rng.random() < 0.5:
        discriminant = b * b - 4 * c
        middle = (
            f"The discriminant is $D = {signed(b)}^2 - 4 \\cdot {signed(c)} = {discriminant}$, so "
            f"$\\sqrt{{D}} = {math.isqrt(discriminant)}$ and ${variable} = \\frac{{{-b} \\pm "
            f"{math.isqrt(discriminant)}}}{{2}}$."
        )
    else:
        factors = f"({variable}{term(-first, '')})({variable}{term(-second, '')})"
        middle = f"As ${first}$ and ${second}$ have sum ${-b}$ and product ${c}$, this is ${factors} = 0$."
    other = f" or ${variable} = {second}$" if second != first else " (a double root)"
    roots = f"${variable} = {first}$" + other
    return f"Solve ${equation} = 0$.", f"{middle}\nTherefore {roots}."


def derivative(rng: random.Random) -> Exercise:
    """Differentiate a polynomial and evaluate the derivative at a point."""
    name, point = rng.choice("fgh"), rng.randint(-4, 4)
    degree = rng.randint(1, 4)
    coefficients = [rng.choice([-1, 1]) * rng.randint(1, 9)] + [rng.randint(-9, 9) for _ in range(degree)]
    slopes = [coefficient * (degree - index) for index, coefficient in enumerate(coefficients[:-1])]
    value = sum(slope * point ** (degree - 1 - index) for index, slope in enumerate(slopes))
    trend = (
        "It is a critical point." if value == 0 else f"There it {'increases' if value > 0 else 'decreases'}."
    )
    problem = f"Differentiate ${name}(x) = {polynomial(coefficients, 'x')}$ at $x = {point}$."
    return problem, f"${name}'(x) = {polynomial(slopes, 'x')}$, so ${name}'({point}) = {value}$. {trend}"


def arithmetic(rng: random.Random) -> Exercise:
    """Greatest common divisor, a remainder, a sum of numbers, or a binomial coefficient, with the steps."""
    kind = rng.randrange(4)
    if kind == 0:
        a, b = rng.randint(40, 999), rng.randint(12, 300)
        steps, high, low = [], a, b
        while low:
            steps.append(f"${high} = {high // low} \\cdot {low} + {high % low}$")
            high, low = low, high % low
        return f"Compute $\\gcd({a}, {b})$.", f"Euclid: {', '.join(steps)}. Hence $\\gcd({a}, {b}) = {high}$."
    if kind == 1:
        base, exponent, modulus = rng.randint(2, 12), rng.randint(3, 9), rng.randint(5, 29)
        value, steps = 1, []
        for power in range(1, exponent + 1):
            value = value * base % modulus
            steps.append(f"${base}^{power} \\equiv {value}$")
        problem = f"Find the remainder of ${base}^{exponent}$ modulo ${modulus}$."
        return problem, f"We have {', '.join(steps)}. The remainder is ${value}$."
    if kind == 2:
        first, step, count = rng.randint(1, 20), rng.randint(1, 9), rng.randint(4, 30)
        last = first + (count - 1) * step
        problem = f"Find the sum ${first} + {first + step} + {first + 2 * step} + \\dots + {last}$."
        product = f"\\frac{{{count} ({first} + {last})}}{{2}}"
        total = count * (first + last) // 2
        return problem, f"There are ${count}$ terms, so the sum is ${product} = {total}$."
    n = rng.randint(4, 14)
    k = rng.randint(2, n - 2)
    things = rng.choice(["balls", "cards", "books", "points", "people", "letters"])
    formula = f"\\binom{{{n}}}{{{k}}} = \\frac{{{n}!}}{{{k}! \\, {n - k}!}}"
    problem = f"In how many ways can one choose ${k}$ of ${n}$ {things}?"
    return problem, f"In ${formula} = {math.comb(n, k)}$ ways."


EXERCISES = (linear_equation, quadratic_equation, derivative, arithmetic)


def worked(rng: random.Random) -> str:
    """One exercise with its solution."""
    return "\n".join(rng.choice(EXERCISES)(rng))


def worksheet(rng: random.Random) -> str:
    """Several worked exercises."""
    return "\n\n".join(f"Exercise {number}. {worked(rng)}" for number in range(1, rng.randint(3, 8)))


def article(rng: random.Random) -> str:
    """A few sections of an article in LaTeX, with a theorem, its proof and a computed example."""
    title, author = PROSE.expand("title", rng, {}), skewed_choice(rng, words.SURNAMES)
    lines = [f"\\title{{{title}}}", f"\\author{{{author}}}", ""]
    for heading in PROSE.expand_several("heading", rng.randint(2, 5), rng, {}):
        lines.append(f"\\section{{{heading}}}")
        lines.append(" ".join(PROSE.expand_several("sentence", rng.randint(3, 7), rng, {})))
        kind = rng.randrange(3)
        if kind == 0:
            environment = rng.choice(["theorem", "lemma", "proposition", "corollary"])
            statement = " ".join(PROSE.expand_several("sentence", 2, rng, {}))
            proof = " ".join(PROSE.expand_several("sentence", rng.randint(2, 5), rng, {}))
            lines += [f"\\begin{{{environment}}}", statement, f"\\end{{{environment}}}"]
            lines += ["\\begin{proof}", proof, "\\end{proof}"]
        elif kind == 1:
            lines += ["\\begin{example}", worked(rng), "\\end{example}"]
        else:
            index, bound = rng.choice("ijk"), rng.choice(["n", "N", "m"])
            power, denominator = rng.choice([("", 2), ("^3", 4)])
            square = "" if power == "" else "^2"
            closed = f"\\frac{{{bound}{square} ({bound} + 1){square}}}{{{denominator}}}"
            total = f"\\sum_{{{index}=1}}^{{{bound}}} {index}{power} = {closed}"
            lines += ["\\begin{equation}", total, "\\end{equation}"]
        lines.append("")
    return "\n".join(lines).strip()


def lean_file(rng: random.Random) -> str:
    """Theorems about natural numbers with tactic proofs, in the manner of Lean."""
    blocks = []
    for _ in range(rng.randint(2, 6)):
        a, b, c = rng.sample(["a", "b", "c", "m", "n", "k", "x", "y"], 3)
        operator, law = rng.choice([("+", "add"), ("*", "mul")])
        kind = rng.randrange(4)
        name = f"{law}_{rng.choice(['comm', 'swap', 'assoc', 'shift', 'turn'])}_{rng.randint(1, 999)}"
        if kind == 0:
            statement, steps = f"{a} {operator} {b} = {b} {operator} {a}", [f"exact Nat.{law}_comm {a} {b}"]
        elif kind == 1:
            statement = f"({a} {operator} {b}) {operator} {c} = {a} {operator} ({c} {operator} {b})"
            steps = [f"rw [Nat.{law}_assoc]", f"rw [Nat.{law}_comm {b} {c}]"]
        elif kind == 2:
            statement = f"{a} = {b} -> {b} = {c} -> {a} = {c}"
            first, second = rng.sample(["h", "h1", "h2", "hab", "hbc"], 2)
            finish = rng.choice([f"rw [{first}, {second}]", f"exact {first}.trans {second}"])
            steps = [f"intro {first} {second}", finish]
        else:
            left, right = rng.randint(2, 99), rng.randint(2, 99)
            total = left + right if operator == "+" else left * right
            statement = f"{left} {operator} {right} = {total}"
            steps = [rng.choice(["rfl", "norm_num", "decide"])]
        variables = "" if kind == 3 else f" ({a} {b}{'' if kind == 0 else ' ' + c} : Nat)"
        body = "\n".join(f"  {step}" for step in steps)
        blocks.append(f"{rng.choice(['theorem', 'lemma'])} {name}{variables} : {statement} := by\n{body}")
    return "\n\n".join(blocks)


def coq_file(rng: random.Random) -> str:
    """Proofs by induction in the manner of Coq."""
    blocks = ["Require Import Arith.", ""]
    for _ in range(rng.randint(2, 5)):
        n, m, k = rng.sample(["n", "m", "p", "k", "q", "a", "b"], 3)
        others, equation = rng.choice(
            [
                ("", f"{n} + 0 = {n}"),
                (f" {m}", f"{n} + S {m} = S ({n} + {m})"),
                (f" {m} {k}", f"{n} + ({m} + {k}) = ({n} + {m}) + {k}"),
            ]
        )
        words_of_name = rng.choice(["plus", "sum", "step", "nat"]), rng.choice(["r", "l", "eq"])
        name = f"{'_'.join(words_of_name)}_{rng.randint(1, 999)}"
        keyword = rng.choice(["Theorem", "Lemma", "Proposition"])
        step = rng.choice([f"simpl. rewrite IH{n}.", f"simpl. rewrite -> IH{n}.", f"cbn. rewrite IH{n}."])
        introduce = f"intros{others}. " if others else ""
        blocks += [
            f"{keyword} {name} : forall {n}{others} : nat, {equation}.",
            "Proof.",
            f"  induction {n} as [| {n}' IH{n}].",
            f"  - {introduce}reflexivity.",
            f"  - {introduce}{step} reflexivity.",
            "Qed.",
            "",
        ]
    return "\n".join(blocks).strip()


def web_question(rng: random.Random) -> str:
    """A question of a web forum, its answer, and what others made of it."""
    people = [f"{skewed_choice(rng, words.SURNAMES).lower()}{rng.randint(1, 99)}" for _ in range(3)]
    opening = rng.choice(
        [
            "I am stuck with this exercise.",
            "Can someone check my solution?",
            "This was in last week's homework.",
            "I do not understand the second step.",
            f"My teacher {skewed_choice(rng, words.FEMALE_NAMES)} says this is easy.",
        ]
    )
    problem, solution = rng.choice(EXERCISES)(rng)
    lines = [f"**{people[0]} asks:** {opening} {problem}", f"**{people[1]} answers:** {solution}"]
    if rng.random() < 0.5:
        similar = rng.choice(["Here is a similar one.", "Try this next.", "Compare with this."])
        lines.append(f"**{people[2]} answers:** {similar} {worked(rng)}")
    return "\n\n".join([*lines, f"*Comment:* {PROSE.expand('sentence', rng, {})}"])


# Proof-Pile-2's three subsets and the generators that stand for them.
SUBSETS: dict[str, tuple[Generator, ...]] = {
    "algebraic-stack": (lean_file, coq_file),
    "arxiv": (article,),
    "open-web-math": (worksheet, web_question),
}
