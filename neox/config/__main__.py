"""Command line: `python -m neox.config check FILES... [key=value...]` and `python -m neox.config layouts`."""

import argparse
import sys
from collections.abc import Sequence

from neox.config import load_config, resolve_config_paths
from neox.config.layouts import markdown
from neox.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    if options.command == "layouts":
        print(markdown(), end="")
        return 0
    try:
        _check(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _check(options: argparse.Namespace) -> None:
    files = [item for item in options.items if "=" not in item]
    overrides = [item for item in options.items if "=" in item]
    paths = resolve_config_paths(files, options.conf_dir)
    config = load_config(paths, overrides=overrides, world_size=options.world_size)
    for notice in config.notices:
        print(notice)
    print(f"valid: {', '.join(map(str, paths))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m neox.config", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check configuration files and print every mistake")
    check.add_argument("items", nargs="+", metavar="FILE|key=value")
    check.add_argument("-d", "--conf_dir", default=None, help="folder of the files")
    check.add_argument("--world-size", type=int, default=None, help="number of processes to check the layout for")
    commands.add_parser("layouts", help="print the table of legal layouts as markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
