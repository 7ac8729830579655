"""Corpus, tokenizer, training, evaluation, samples and export in a few minutes, on a GPU or two CPU cores.

    python tools/quickstart.py                      everything goes to quickstart_run/
    python tools/quickstart.py --out other --config my.yml          a configuration of your own

The text is that of the Python standard library on this machine; nothing is downloaded.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox.launch.arguments import Parser
from neox.launch.main import script_main


def main(arguments: list[str]) -> None:
    """Read the command line and do it all."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quickstart_run"), help="folder to make")
    parser.add_argument(
        "--config", type=Path, metavar="YML", help="model and training; default: configs/quickstart.yml"
    )
    options = parser.parse_args(arguments)

    # Read when torch is loaded, here and in every script that is run: threads that spin while they wait make a
    # step seven times slower as soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from neox.quickstart.run import CONFIG, Run, run_quickstart

    run_quickstart(Run(options.out, options.config or CONFIG))


if __name__ == "__main__":
    sys.exit(script_main(main))
