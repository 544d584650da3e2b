"""The README shows what is there: its tree, its links and its make targets."""

import ast
import re
from pathlib import Path, PurePosixPath

import pytest

from tests.repository_rules import ROOT, tracked_files

TREE_HEADING = "## What is where"
# Listed as one line: tests mirror the tree.
SUMMARISED = "tests"


def tree_paths(readme: str) -> dict[str, str]:
    """Path -> description for every line of the README's tree; folders end in a slash.

    Raises:
        ValueError: for a line without a description.
    """
    block = readme.split(TREE_HEADING)[1].split("```")[1].split("\n", 1)[1]
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in block.splitlines():
        match = re.fullmatch(r"((?:  )*)(\S+)  +(\S.*)", line)
        if not match:
            raise ValueError(f"not 'name  description': {line!r}")
        depth, name = len(match[1]) // 2, match[2]
        parents = [*parents[:depth], name]
        found["".join(parents)] = match[3]
    return found


def suggested_line(path: Path) -> str:
    """What the tree could say about `path`: the first line of its docstring or comment."""
    text = (ROOT / path).read_text()
    if path.suffix == ".py":
        first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    else:
        comments = re.findall(r"^# (?!shellcheck)(.*)$", text, flags=re.MULTILINE)
        first = comments[0] if comments else ""
    return f"{'  ' * (len(path.parts) - 1)}{path.name}  {first.rstrip('.')}"


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_every_source_file_is_in_the_tree(readme: str) -> None:
    listed = tree_paths(readme)
    files = [
        path
        for path in tracked_files(".py", ".sh", ".yaml")
        if path.parts[0] != SUMMARISED and path.name != "__init__.py"
    ]
    missing = [suggested_line(path) for path in files if path.as_posix() not in listed]
    assert not missing, "add to the README's tree:\n" + "\n".join(missing)


def test_the_tree_lists_nothing_that_is_not_there(readme: str) -> None:
    files = {path.as_posix() for path in tracked_files()}
    folders = {f"{parent}/" for name in files for parent in PurePosixPath(name).parents}
    assert not [name for name in tree_paths(readme) if name not in files | folders]


def test_links_lead_to_files(readme: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", readme)
    assert "LICENSE" in targets
    local = [target for target in targets if not target.startswith("https://")]
    assert not [target for target in local if not (ROOT / target).exists()]


def test_make_targets_exist(readme: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = readme + (ROOT / "docs/development.md").read_text() + (ROOT / "docs/method.md").read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert {"demo", "test"} <= named
    assert not [target for target in named if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)]


def test_scripts_that_make_calls_exist() -> None:
    called = re.findall(r"\$\(PYTHON\) (\S+\.py)", (ROOT / "Makefile").read_text())
    assert "demo/run_demo.py" in called
    assert not [script for script in called if not (ROOT / script).is_file()]


def test_scripts_and_recipes_named_in_words_exist(readme: str) -> None:
    named = set(re.findall(r"\b((?:[a-z_]+/)+[a-z0-9_]+\.(?:py|sh|yaml))\b", readme))
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]


@pytest.mark.parametrize("line", ["data_prep/", "  lonely.py"])
def test_a_line_without_a_description_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not 'name  description'"):
        tree_paths(f"{TREE_HEADING}\n```\n{line}\n```\n")


def test_nested_names_are_joined() -> None:
    block = "a/        folder\n  b/      inner\n    c.py  file\n  d.py    file\ne.py      file\n"
    assert list(tree_paths(f"{TREE_HEADING}\n```\n{block}```\n")) == [
        "a/",
        "a/b/",
        "a/b/c.py",
        "a/d.py",
        "e.py",
    ]
