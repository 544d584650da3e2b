"""Starts the soak's run, or goes on with it; its supervisor repeats this one command.

python soak/start_run.py MODULE RANKS RECIPE.yaml
"""

import os
import sys

from data_prep.errors import run_cli
from data_prep.process_ties import die_with_parent
from pretrain.launch import launch


def main() -> None:
    """Entry point."""
    die_with_parent(os.getppid())  # a soak that is killed leaves nothing running
    module, ranks, recipe = sys.argv[1:]
    sys.exit(launch(["--ranks-per-node", ranks, recipe, "--resume"], module=module))


if __name__ == "__main__":
    run_cli(main)
