"""What the tests of the job scripts share: a cluster, and a checkout from which jobs are submitted."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.repository_rules import LAYERS, ROOT
from tests.slurm.cluster import Cluster, missing

# One node, no GPU; shared with other jobs of the tests, where the scripts ask for the whole node.
SMALL = ("--nodes=1", "--gpus-per-node=0", "--exclusive=user")


@dataclass
class Checkout:
    """A folder like a fresh clone, from whose root jobs are submitted; what they write stays in it."""

    cluster: Cluster
    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    """Facts of the site, instead of those in slurm/env.sh."""

    def submit(
        self, script: str, *arguments: str, options: tuple[str, ...] = SMALL, **environment: str
    ) -> str:
        """Submit slurm/`script`; returns the job's number."""
        command = ("sbatch", "--parsable", *options, f"slurm/{script}", *arguments)
        return self.cluster.run(*command, cwd=self.root, **self.environment | environment).strip()

    def log(self, job: str) -> str:
        """What the job has written so far, over all its starts."""
        return "".join(path.read_text() for path in sorted((self.root / "slurm/logs").glob(f"*-{job}.out")))


def make_checkout(cluster: Cluster, root: Path, **environment: str) -> Checkout:
    """A checkout in the new folder `root`: the job scripts as copies, everything else as links."""
    shutil.copytree(ROOT / "slurm", root / "slurm", ignore=shutil.ignore_patterns("*.out"))
    for name in (*LAYERS, "configs"):
        (root / name).symlink_to(ROOT / name)
    return Checkout(
        cluster,
        root,
        {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "RANKS_PER_NODE": "1", **environment},
    )


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Slurm with three nodes; where it cannot be had, the tests are skipped with the reason."""
    reason = missing()
    if reason:
        pytest.skip(f"no Slurm: {reason}")
    # Not in pytest's folder: munged wants its socket where everyone may pass, at a path of less than 108 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
