"""What a benchmark ran on, to stand beside its figures."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = (
    "torch",
    "megatron-core",
    "numpy",
    "pyarrow",
    "tokenizers",
    "sentencepiece",
    "fastokens",
    "orjson",
    "xxhash",
)


def describe_machine() -> dict[str, object]:
    """Processor, cores, memory, system and the versions that matter."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
    }
