"""Can this machine train, what will a run use, and what stands in its way?

    python -m pretrain.doctor [RECIPE.yaml [--section.field value ...]]

Prints what is installed, what a run will use of it (collectives, layers, attention, optimizer, FP8 recipes) and every
known trap with its remedy; with a recipe, also what in it this machine cannot do. Nothing is started or written.
Exit code 0: training can run, warnings or not; 2: it cannot. On a cluster run it on a compute node: a login node
without GPUs answers for itself.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import UserError, run_cli
from pretrain.doctor_checks import (
    NEEDED,
    Finding,
    Machine,
    dotted,
    find_import_trap,
    find_machine_traps,
    find_package_traps,
    find_recipe_traps,
    look_at_machine,
)

if TYPE_CHECKING:
    from rich.table import Table

    from pretrain.backends import Backends

# rich, torch and Megatron are imported inside functions: where one is missing, that is the finding.


def installed_table(machine: Machine, backends: "Backends | None") -> "Table":
    """Package -> version, then what the machine is."""
    table = _table("installed", "what", "found")
    table.add_row("Python", dotted(machine.python))
    for name in NEEDED:
        table.add_row(name, machine.versions.get(name, "missing"))
    for name in ("transformer_engine", "transformer_engine_torch"):
        table.add_row(name, machine.versions.get(name, "none (optional)"))
    if backends is not None:
        table.add_row(
            "apex", {"none": "none (optional)", "nvidia": "NVIDIA's"}.get(backends.apex, backends.apex)
        )
        built_for = "CPU" if backends.cuda_version is None else dotted(backends.cuda_version)
        table.add_row("CUDA that torch was built for", built_for)
        table.add_row("NCCL", backends.nccl or "none in use")
    for gpu in machine.nvidia_gpus or ("none that an NVIDIA driver knows",):
        table.add_row("GPU", gpu)
    table.add_row("cores", str(machine.cores))
    table.add_row("/dev/shm", f"{machine.shared_memory_gib:.1f} GiB")
    table.add_row("open files", f"{machine.open_files:,}")
    return table


def used_table(backends: "Backends") -> "Table":
    """What a run takes of it."""
    table = _table("a run here uses", "for", "takes")
    memory = "" if backends.device_memory_gib is None else (
        f", {backends.device_memory_gib} GiB, compute capability {dotted(backends.compute_capability or ())}"
    )  # fmt: skip
    table.add_row("device", backends.device_name + memory)
    table.add_row("collectives", backends.collectives)
    table.add_row("layers", {"local": "Megatron's own"}.get(backends.layer_spec, "Transformer Engine's"))
    table.add_row("attention", backends.attention)
    table.add_row("AdamW", backends.fused_optimizer)
    table.add_row("FP8 recipes", ", ".join(backends.fp8_recipes) or "none")
    return table


def main() -> None:
    """Print the tables, then say whether training can run."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return
    if arguments and arguments[0].startswith("-"):
        raise UserError("usage: pretrain.doctor [RECIPE.yaml [--section.field value ...]]")
    try:
        importlib.import_module("rich.table")
    except ImportError:
        raise UserError(
            "rich: not installed, like the rest, it seems; pip install -r requirements.txt"
        ) from None
    examine(arguments)


def examine(arguments: list[str]) -> None:
    """Look at everything and print it; `arguments`: none, or a recipe and its overrides.

    Raises:
        UserError: training cannot run, or the recipe cannot be read.
    """
    from rich.console import Console

    machine = look_at_machine()
    backends, findings = diagnose(machine, arguments)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(installed_table(machine, backends))
    if backends is not None:
        console.print(used_table(backends))
    stops = sum(finding.stops for finding in findings)
    for finding in sorted(findings, key=lambda finding: not finding.stops):
        console.print("STOPS  " if finding.stops else "warning", finding.text, markup=False, highlight=False)
    if stops:
        raise UserError(f"{stops} problem(s) keep training from running here; they are marked STOPS above")
    what = arguments[0] if arguments else "training"
    console.print(f"{what} can run here ({len(findings)} warning(s)).", markup=False, highlight=False)


def diagnose(machine: Machine, arguments: list[str]) -> "tuple[Backends | None, list[Finding]]":
    """The back ends, None where torch cannot tell, and all findings. What nothing else can be asked of comes first."""
    findings = list(find_package_traps(machine))
    if "torch" in machine.versions:
        findings += find_import_trap("torch")
    if any(finding.stops for finding in findings):
        return None, findings
    from pretrain.backends import find_backends
    from pretrain.recipes import load_recipe

    backends = find_backends()
    findings += find_machine_traps(machine, backends)
    if arguments:
        config = load_recipe(Path(arguments[0]), arguments[1:])
        findings += find_recipe_traps(config, machine, backends)
    if not any(finding.stops for finding in findings):
        findings += find_import_trap("megatron.core.models.gpt")
    return backends, findings


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left")


if __name__ == "__main__":
    run_cli(main)
