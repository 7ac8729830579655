"""Run a module's `main` as the ranks of all hosts: `python -m neox.launch.ranks MODULE ARGUMENTS...` on each.

What `train.py` does for itself, for programs that know no launcher: they find torch's variables set.
"""

import os
from importlib import import_module

from neox.errors import LaunchError
from neox.launch.environment import detect
from neox.launch.local import run_local
from neox.launch.main import leave, script_main
from neox.launch.meeting import enter
from neox.launch.node import detect_node


def main(argv: list[str]) -> int:
    """Run the module as the rank that we are, or start this host's ranks."""
    placement = detect(os.environ)
    if placement is not None:
        enter(placement)
        return int(import_module(argv[0]).main(argv[1:]))
    node = detect_node(os.environ)
    if node is None:
        raise LaunchError("neox.launch.ranks: no launcher found; it is started on every host by neox.launch")
    return run_local(["-m", "neox.launch.ranks", *argv], workers=node.workers(1), environ=os.environ, node=node)


if __name__ == "__main__":
    leave(script_main(main))
