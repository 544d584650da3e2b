"""The launcher's own options, which stand before the recipe."""

import argparse
from dataclasses import dataclass
from typing import NoReturn

from data_prep.errors import UserError


@dataclass(frozen=True, kw_only=True)
class NodeLayout:
    """The place of this node's ranks among all."""

    nodes: int
    """Machines of the run."""
    node_rank: int
    """Which of them this is, from 0."""
    ranks_per_node: int
    """Training processes on each."""
    master: str
    """HOST:PORT where several nodes meet; empty for one."""


class _OneLineParser(argparse.ArgumentParser):
    """Its complaints are one line, like everybody's here."""

    def error(self, message: str) -> NoReturn:
        """Instead of the usage and an exit."""
        raise UserError(f"command line: {message}; see python -m pretrain.launch --help")


def parse_options(arguments: list[str], description: str | None) -> tuple[NodeLayout, list[str]]:
    """The options, and what follows them: the recipe and all that training is given.

    Raises:
        UserError: if they are wrong, or do not fit together.
    """
    parser = _OneLineParser(
        prog="python -m pretrain.launch",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines of the run (1)")
    parser.add_argument("--node-rank", type=int, default=0, help="which of them this is, from 0 (0)")
    parser.add_argument(
        "--ranks-per-node", type=int, default=1, help="training processes here, one a GPU (1)"
    )
    parser.add_argument(
        "--master", metavar="HOST:PORT", default="", help="where several nodes meet: a free port of the first"
    )
    parser.add_argument(
        "training", nargs=argparse.REMAINDER, metavar="RECIPE ...", help="what pretrain.train is given"
    )
    options = parser.parse_args(arguments)
    layout = NodeLayout(
        nodes=options.nodes,
        node_rank=options.node_rank,
        ranks_per_node=options.ranks_per_node,
        master=options.master,
    )
    _check(layout)
    return layout, options.training


def _check(layout: NodeLayout) -> None:
    if layout.ranks_per_node < 1:
        raise UserError(f"--ranks-per-node {layout.ranks_per_node}: must be at least 1")
    if not 0 <= layout.node_rank < layout.nodes:
        raise UserError(
            f"--node-rank {layout.node_rank}: of --nodes {layout.nodes}; node ranks go from 0 to one below --nodes"
        )
    host, _, port = layout.master.rpartition(":")
    if layout.nodes > 1 and not (host and port.isdecimal() and int(port)):
        raise UserError(
            f"--master '{layout.master}': several nodes need HOST:PORT, a port that is free on the first node"
        )
