"""Show what is in a checkpoint of any format, or in what two checkpoints differ, each of any format.

python tools/ckpts/inspect_checkpoint.py RUN/global_step1000
python tools/ckpts/inspect_checkpoint.py RUN/global_step1000 exported --match "attention"

Two checkpoints that differ give exit status 1.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.checkpoint.inspection import description, differences, facts
from neox.checkpoint.inspection_text import as_json, comparison, described, tree
from neox.checkpoint.open import open_checkpoint
from neox.launch.main import script_main


def main(arguments: list[str]) -> int:
    """Print the tree, or the differences."""
    options = _parse(arguments)
    readers = [open_checkpoint(path) for path in options.path]
    about = [{"folder": str(reader.folder)} | description(reader) for reader in readers]
    names = dict.fromkeys(name for reader in readers for name in reader.names() if options.match.search(name))
    lines = [line for found in about for line in described(found)]
    if options.dry_run:
        print("\n".join(["would read", *lines]))
        return 0
    if len(readers) == 1:
        tensors = list(facts(readers[0], names))
        content = {"checkpoint": about[0], "tensors": [as_json(tensor) for tensor in tensors]}
        lines, status = lines + tree(tensors), 0
    else:
        apart = [found for found in differences(readers[0], readers[1], names) if found is not None]
        content = {"checkpoints": about, "differences": [as_json(difference) for difference in apart]}
        lines, status = lines + comparison(apart, compared=len(names)), int(bool(apart))
    print(json.dumps(content, indent=1) if options.json else "\n".join(lines))
    return status


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", nargs="+", type=Path, metavar="CHECKPOINT", help="one to show, or two to compare")
    add("--match", type=_pattern, default="", metavar="REGEX", help="only tensors whose name has a match")
    add("--json", action="store_true", help="print JSON")
    add("--dry-run", action="store_true", help="say what would be read, without reading a tensor")
    options = parser.parse_args(arguments)
    if len(options.path) > 2:
        parser.error(f"{len(options.path)} checkpoints given; one is shown, two are compared")
    return options


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is no regular expression: {error}") from None


if __name__ == "__main__":
    sys.exit(script_main(main))
