"""Real text that every Python installation carries: library modules, C headers, docstrings, topics."""

import ast
import os
import pydoc_data.topics
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

LONGEST_PIECE_CHARACTERS = 12_000
SHORTEST_DOCSTRING_CHARACTERS = 400
# Left out: other people's packages, tests (odd on purpose), and tables that are data rather than code.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "__pycache__",
    "encodings",
    "pydoc_data",
}
DEFINITION_STARTS = ("class ", "def ", "@", "async def ", "static ", "typedef ", "/*")


def _texts(folder: Path, suffix: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the folder's files in an order drawn by `rng`; read one at a time."""
    paths = []
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        paths += [Path(parent, name) for name in names if name.endswith(suffix)]
    paths.sort()
    rng.shuffle(paths)
    for path in paths:
        try:
            yield path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few modules declare another encoding


def cut_into_pieces(text: str) -> Iterator[str]:
    """Cut a long module where a top-level definition begins, so that no file is a tenth of the corpus."""
    piece = ""
    for line in text.splitlines(keepends=True):
        longest = LONGEST_PIECE_CHARACTERS * (1 if line.startswith(DEFINITION_STARTS) else 2)
        if len(piece) > longest:
            yield piece
            piece = ""
        piece += line
    yield piece


def _named_pieces(folder: Path, suffix: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    for name, text in _texts(folder, suffix, rng):
        for number, piece in enumerate(cut_into_pieces(text)):
            if piece.strip():
                yield f"{name.removesuffix(suffix)}{'_' + str(number) if number else ''}{suffix}", piece


def python_modules(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the standard library's modules; long ones in pieces."""
    yield from _named_pieces(Path(sysconfig.get_path("stdlib")), ".py", rng)


def c_headers(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of Python's C headers; nothing where they are not installed."""
    yield from _named_pieces(Path(sysconfig.get_path("include")), ".h", rng)


def _definitions(node: ast.Module | ast.ClassDef) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """The module or class itself, its functions, and its classes with theirs."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _definitions(child)
        elif isinstance(child, ast.FunctionDef):
            yield child


def documentation(rng: random.Random) -> Iterator[str]:
    """Yield English text about Python: the reference's topics, then the library's longer docstrings."""
    topics = sorted(pydoc_data.topics.topics.values())
    rng.shuffle(topics)
    yield from (text.strip() for text in topics)
    for _, text in _texts(Path(sysconfig.get_path("stdlib")), ".py", rng):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            try:
                tree = ast.parse(text)
            except SyntaxError:
                continue  # templates and grammar samples
        for definition in _definitions(tree):
            docstring = ast.get_docstring(definition)
            if docstring and len(docstring) >= SHORTEST_DOCSTRING_CHARACTERS:
                yield docstring
