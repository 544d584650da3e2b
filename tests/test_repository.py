"""The house rules hold for every file, and each rule refuses a file that breaks it."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests import repository_rules as rules
from tests.repository_rules import ROOT, package_files, tracked_files

# Requirements that no file imports: tools, and what a library needs without saying so.
NOT_IMPORTED = {
    "psutil": "megatron-core's checkpoint writer hangs without it",
    "mypy": "make check",
    "ruff": "make check",
    "types-PyYAML": "types for mypy",
    "types-tqdm": "types for mypy",
}
# Imported only where it is installed; requirements-gpu.txt.
GPU_ONLY = {"transformer_engine", "apex"}
REQUIREMENT_OF_MODULE = {"PIL": "pillow", "jinja2": "Jinja2", "megatron": "megatron-core", "yaml": "PyYAML",
                         "xdist": "pytest-xdist"}  # fmt: skip


def _problems(files: list[Path], rule: Callable[[str], Iterable[str]]) -> list[str]:
    return [f"{path}: {problem}" for path in files for problem in rule((ROOT / path).read_text())]


def test_there_are_files_to_check() -> None:
    assert {path.parts[0] for path in package_files()} == set(rules.LAYERS)


def test_files_and_functions_are_short() -> None:
    assert not _problems(tracked_files(".py"), rules.size_problems)


def test_modules_say_what_they_are() -> None:
    files = [path for path in tracked_files(".py") if (ROOT / path).stat().st_size]
    assert not _problems(files, rules.docstring_problems)


def test_nothing_runs_at_import() -> None:
    assert not _problems(package_files(), rules.module_level_problems)


def test_imports_point_down() -> None:
    problems = [
        f"{path}: {problem}"
        for path in package_files()
        for problem in rules.layering_problems(path, (ROOT / path).read_text())
    ]
    assert not problems


def test_global_process_groups_are_read_in_one_place() -> None:
    files = [path for path in package_files() if path != Path("pretrain/parallel.py")]
    assert not _problems(files, rules.parallel_state_problems)


def test_files_that_travel_with_the_weights_stand_alone() -> None:
    files = [path for path in package_files() if path.parts[:2] == ("checkpoint_tools", "huggingface")]
    assert files
    assert not _problems(files, rules.self_containment_problems)


def test_no_file_is_named_like_a_standard_module() -> None:
    # `python data_prep/x.py` puts data_prep/ first on the path: a tokenize.py there breaks `import torch`.
    assert not [path for path in package_files() if path.stem in sys.stdlib_module_names - {"__init__"}]


def test_no_words_of_one_machine_or_of_unfinished_work() -> None:
    files = [p for p in tracked_files() if p.suffix in (".py", ".sh", ".yaml", ".toml", ".txt", ".md", "")]
    assert not _problems([p for p in files if p.name != "LICENSE"], rules.word_problems)


def test_code_and_comments_are_ascii() -> None:
    assert not _problems(tracked_files(".py"), rules.non_ascii_problems)


def test_every_config_field_is_read() -> None:
    sources = [(ROOT / path).read_text() for path in package_files()]
    fields = [field for source in sources for field in rules.config_fields(source)]
    assert ("TrainingConfig", "steps") in fields
    read = rules.attributes_read(sources)
    assert not [f"{owner}.{name}" for owner, name in fields if name not in read]


def test_requirements_are_what_is_imported() -> None:
    assert (ROOT / "requirements.txt").read_text().splitlines()[-1] == "-e ."
    listed = _pins("requirements.txt")
    imported = set()
    for path in tracked_files(".py"):
        imported |= {name.split(".")[0] for name in rules.imported_modules((ROOT / path).read_text())}
    ours = {"tests"} | set(rules.LAYERS) | {path.stem for path in tracked_files(".py")}
    third_party = imported - sys.stdlib_module_names - ours - GPU_ONLY - _pins("requirements-bench.txt")
    needed = {REQUIREMENT_OF_MODULE.get(name, name) for name in third_party}
    assert needed - listed == set(), "imported, but not in requirements.txt"
    assert listed - needed - set(NOT_IMPORTED) == set(), "in requirements.txt, but imported nowhere"


def test_what_only_benchmarks_need_is_imported_only_there() -> None:
    bench_only = _pins("requirements-bench.txt")
    files = [path for path in tracked_files(".py") if path.parts[0] != "benchmarks"]
    imports = {
        name.split(".")[0] for path in files for name in rules.imported_modules((ROOT / path).read_text())
    }
    assert not imports & bench_only


def _pins(name: str) -> set[str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    pins = [line for line in lines if line and line != "-e ."]
    assert not [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9a-z.]+", pin)]
    return {pin.split("==")[0] for pin in pins}


def _layering_from_data_prep(source: str) -> Iterator[str]:
    return rules.layering_problems(Path("data_prep/x.py"), source)


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        (rules.size_problems, "x = 1\n" * 401),
        (rules.size_problems, "def f() -> None:\n" + "    print()\n" * 60),
        (rules.docstring_problems, "import os\n"),
        (rules.module_level_problems, '"""Doc."""\nprint("hello")\n'),
        (rules.module_level_problems, "for i in range(3):\n    x = i\n"),
        (_layering_from_data_prep, "from pretrain import config\n"),
        (_layering_from_data_prep, "def f() -> None:\n    import evaluation.report\n"),
        (rules.parallel_state_problems, "from megatron.core import parallel_state\n"),
        (rules.parallel_state_problems, "from megatron.core.parallel_state import get_data_parallel_rank\n"),
        (rules.self_containment_problems, "import safetensors.torch\n"),
        (rules.self_containment_problems, "from checkpoint_tools.huggingface import configuration_cola\n"),
        (rules.word_problems, "path = '/wo" + "rk/x'\n"),
        (rules.word_problems, "# TO" + "DO: later\n"),
        (rules.non_ascii_problems, "# caf\u00e9\n"),
        (rules.non_ascii_problems, "\u00e9 = 1\n"),
    ],
)
def test_a_rule_refuses_what_breaks_it(rule: Callable[[str], Iterable[str]], bad: str) -> None:
    assert list(rule(bad))


@pytest.mark.parametrize(
    ("rule", "good"),
    [
        (rules.non_ascii_problems, 'text = "\u00e9"\n'),
        (rules.word_problems, "see framework/x and runs/work/y\n"),
        (
            rules.self_containment_problems,
            "from .configuration_cola import ColaConfig\nimport math\nimport torch\n",
        ),
        (_layering_from_data_prep, "from data_prep import errors\nimport numpy\n"),
    ],
)
def test_a_rule_lets_good_files_be(rule: Callable[[str], Iterable[str]], good: str) -> None:
    assert not list(rule(good))


def test_a_field_that_is_only_checked_counts_as_unread() -> None:
    source = """
@dataclass(frozen=True)
class RunConfig:
    used: int
    checked: int

def find_problems(config: RunConfig) -> list[int]:
    return [config.checked]

def train(config: RunConfig) -> int:
    return config.used
"""
    assert list(rules.config_fields(source)) == [("RunConfig", "used"), ("RunConfig", "checked")]
    assert rules.attributes_read([source]) & {"used", "checked"} == {"used"}
