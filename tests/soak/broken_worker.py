"""A rank of a trainer that is broken on purpose: it loads damaged checkpoints, and forgets the optimizer's state."""

import sys
from pathlib import Path

from data_prep.errors import run_cli
from pretrain import cpu_redirects, train
from soak.worker import obey_orders


def main() -> None:
    """Entry point."""
    cpu_redirects.apply()
    from pretrain.checkpoints import checkpointing, resume

    resume.find_damage = lambda *_: None
    checkpointing.load_optimizer = lambda *_: None
    obey_orders(Path(sys.argv[1]))
    train.main()


if __name__ == "__main__":
    run_cli(main)
