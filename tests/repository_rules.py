"""House rules as functions from a file's text to problems, so that each can be tried on a bad file."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A folder imports only from folders to its left.
LAYERS = ("data_prep", "pretrain", "checkpoint_tools", "evaluation", "demo", "benchmarks", "soak")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# The redirects must stand before Megatron is imported.
ALLOWED_AT_IMPORT = ("cpu_redirects.apply()",)
# In pieces, so that this file does not break its own rule. Paths of one machine, and notes to ourselves.
FORBIDDEN_WORDS = tuple(
    "".join(pieces)
    for pieces in (("/wo", "rk/"), ("/ro", "ot/"), ("/ho", "me/"), ("TO", "DO"), ("FIX", "ME"), ("XX", "X"))
)
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)


def tracked_files(*suffixes: str) -> list[Path]:
    """Files that git knows or would add, relative to the repository, with one of `suffixes` (all if none)."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = [Path(line) for line in listing.splitlines() if (ROOT / line).is_file()]
    return sorted(path for path in paths if not suffixes or path.suffix in suffixes)


def package_files() -> list[Path]:
    """Python files of the packages, without tests and without empty package markers."""
    files = [path for path in tracked_files(".py") if path.parts[0] in LAYERS]
    return [path for path in files if (ROOT / path).stat().st_size > 0]


def size_problems(source: str) -> Iterator[str]:
    """Files and functions that are too long to read in one go."""
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{lines} lines, more than {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"function {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}"


def docstring_problems(source: str) -> Iterator[str]:
    """A module that does not say what it is for."""
    if not ast.get_docstring(ast.parse(source)):
        yield "no module docstring"


def module_level_problems(source: str) -> Iterator[str]:
    """Statements that run at import: only imports, constants and definitions may."""
    for position, node in enumerate(ast.parse(source).body):
        is_docstring = position == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_guard = isinstance(node, ast.If) and ast.unparse(node.test) in (
            "__name__ == '__main__'",
            "TYPE_CHECKING",
        )
        allowed = ast.unparse(node) in ALLOWED_AT_IMPORT
        if not (is_docstring or is_guard or allowed or isinstance(node, DEFINITIONS)):
            yield f"line {node.lineno}: runs at import: {ast.unparse(node).splitlines()[0]}"


def imported_modules(source: str) -> set[str]:
    """Dotted names of all modules imported absolutely, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layering_problems(path: Path, source: str) -> Iterator[str]:
    """Imports from a folder to the right of the file's own."""
    above = LAYERS[LAYERS.index(path.parts[0]) + 1 :]
    for name in sorted(imported_modules(source)):
        if name.split(".")[0] in above:
            yield f"imports {name}; {path.parts[0]} may import only from folders before it in {LAYERS}"


def parallel_state_problems(source: str) -> Iterator[str]:
    """Reads of Megatron's global process groups."""
    for name in sorted(imported_modules(source)):
        if "parallel_state" in name.split("."):
            yield f"imports {name}; only pretrain/parallel.py may, everything else receives a ParallelContext"


def self_containment_problems(source: str) -> Iterator[str]:
    """Imports of a file that travels beside the weights: torch, transformers, standard library only."""
    for name in sorted(imported_modules(source)):
        top = name.split(".")[0]
        if top not in ("torch", "transformers") and top not in sys.stdlib_module_names:
            yield f"imports {name}, which is not there where the exported model is loaded"


def word_problems(text: str) -> Iterator[str]:
    """Words that belong to one machine or to unfinished work."""
    for number, line in enumerate(text.splitlines(), start=1):
        for word in FORBIDDEN_WORDS:
            if re.search(rf"(?<![\w.-]){re.escape(word)}", line):
                yield f"line {number}: contains {word!r}"


def non_ascii_problems(source: str) -> Iterator[str]:
    """Characters outside ASCII in code and comments; strings may hold what they must."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        in_string = token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
        if not in_string and not token.string.isascii():
            yield f"line {token.start[0]}: not ASCII: {token.string.strip()}"


def config_fields(source: str) -> Iterator[tuple[str, str]]:
    """(class, field) of every dataclass whose name ends in Config, Options or Settings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Options", "Settings")):
            if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield node.name, item.target.id


def attributes_read(sources: Iterable[str]) -> set[str]:
    """Names read as attributes (`x.name`) outside of functions that only check a configuration."""
    names: set[str] = set()
    for source in sources:
        for node in _outside_checks(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


def _outside_checks(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        checks = isinstance(child, ast.FunctionDef) and re.search(r"problems$|^validate|^check", child.name)
        if not checks:
            yield from _outside_checks(child)
