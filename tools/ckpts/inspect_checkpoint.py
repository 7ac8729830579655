"""Show what is in a checkpoint of any format, or in what two checkpoints differ, each of any format.

python tools/ckpts/inspect_checkpoint.py RUN/global_step1000
python tools/ckpts/inspect_checkpoint.py RUN/global_step1000 exported --match "attention"

Two checkpoints that differ give exit status 1.
"""

import argparse
import code
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.launch.arguments import Parser
from neox.launch.main import script_main
from neox.results import print_result


def main(arguments: list[str]) -> int:
    """Print the tree, or the differences."""
    options = _parse(arguments)
    from neox.checkpoint.inspection.contents import description, differences, facts, selected
    from neox.checkpoint.inspection.text import as_json, comparison, described, tree
    from neox.checkpoint.open import open_checkpoint

    readers = [open_checkpoint(Path(path)) for path in options.path]
    about = [{"folder": str(reader.folder)} | description(reader) for reader in readers]
    names = selected(readers, match=options.match, attributes=options.attributes)
    lines = [line for found in about for line in described(found)]
    if options.dry_run:
        print_result("\n".join(["would read", *lines]))
        return 0
    if len(readers) == 1:
        tensors = list(facts(readers[0], names))
        content = {"checkpoint": about[0], "tensors": [as_json(tensor) for tensor in tensors]}
        lines, status = lines + tree(tensors), 0
    else:
        apart = [found for found in differences(readers[0], readers[1], names) if found is not None]
        content = {"checkpoints": about, "differences": [as_json(difference) for difference in apart]}
        lines, status = lines + comparison(apart, compared=len(names)), int(bool(apart))
    print_result(json.dumps(content, indent=1) if options.json else "\n".join(lines))
    if options.interactive:
        code.interact(banner="checkpoints[0].tensor(NAME) reads a tensor", local={"checkpoints": readers})
    return status


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", nargs="+", metavar="CHECKPOINT", help="one to show, or two to compare")
    add("--match", default="", metavar="REGEX", help="only tensors whose name has a match")
    add("--attributes", nargs="*", default=(), metavar="NAME", help="only these layers or tensors: layers/2, say")
    add("--json", action="store_true", help="print JSON")
    add("-c", "--compare", action="store_true", help="compare CHECKPOINT,OTHER, as GPT-NeoX's tool spells it")
    add("-d", "--diff", action="store_true", help="as in GPT-NeoX's tool; only differences are printed anyway")
    add("-i", "--interactive", action="store_true", help="then go on in Python, with `checkpoints`")
    add("--dry-run", action="store_true", help="say what would be read, without reading a tensor")
    options = parser.parse_args(arguments)
    if options.compare:
        options.path = [path.strip() for word in options.path for path in word.split(",")]
    if len(options.path) > 2 or (options.compare and len(options.path) < 2):
        parser.error(f"{len(options.path)} checkpoints given; one is shown, two are compared")
    return options


if __name__ == "__main__":
    sys.exit(script_main(main))
