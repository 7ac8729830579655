"""Verify that a checkpoint of any format is whole, or that two checkpoints compute the same.

python tools/ckpts/verify_checkpoint.py RUN/global_step1000
python tools/ckpts/verify_checkpoint.py RUN/global_step1000 --logits exported --tokens random

Exit status 0: whole, or the logits agree. 1: damaged, or they do not. 2: it is no checkpoint.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.choices import LOGITS_BATCH_SIZE
from neox.launch.arguments import Parser
from neox.launch.main import script_main
from neox.launch.options import positive
from neox.results import print_result

TOLERANCE = 1e-4


def main(arguments: list[str]) -> int:
    """Print a line for each thing that is wrong, or one that says that nothing is."""
    options = _parse(arguments)
    from neox.checkpoint.inspection.logits import read_tokens
    from neox.checkpoint.inspection.verify import compare_logits, damages_of
    from neox.checkpoint.open import locate_checkpoint

    folders = [locate_checkpoint(path) for path in (options.checkpoint, options.logits) if path]
    if options.dry_run:
        for folder in folders:
            files = [path for path in folder.iterdir() if path.is_file()]
            print_result(
                f"would read {folder}: {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes"
            )
        return 0
    if options.logits is None:
        damages = damages_of(folders[0])
        print_result("\n".join(damages) or f"{folders[0]}: whole")
        return int(bool(damages))
    tokens_BS = None if options.tokens in (None, "random") else read_tokens(Path(options.tokens))
    found = compare_logits(
        *folders,
        tokens_BS=tokens_BS,
        config_files=options.config_file,
        batch_size=options.batch_size or LOGITS_BATCH_SIZE,
    )
    print_result(f"{folders[0]} and {folders[1]}: {found}")
    tolerance = TOLERANCE if options.tolerance is None else options.tolerance
    return int(not found.difference <= tolerance)  # nor is a difference that is no number


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint of any known format, or a folder of them")
    add("--logits", type=Path, metavar="OTHER", help="compare logits with this checkpoint instead of reading checksums")
    add("--tokens", metavar="FILE", help=".npy with integer ids [B, S]; default: random, which means random ones")
    add("--tolerance", type=float, help=f"largest difference of logits (default: {TOLERANCE:g})")
    add("--config_file", nargs="+", default=(), metavar="FILE", help="model, where the checkpoints do not say")
    add(
        "--batch_size",
        type=positive,
        help=f"sequences computed together (default: {LOGITS_BATCH_SIZE})",
    )
    add("--dry-run", action="store_true", help="say what would be read")
    options = parser.parse_args(arguments)
    for name in ("tokens", "tolerance", "config_file", "batch_size"):
        if options.logits is None and getattr(options, name) not in (None, ()):
            parser.error(f"--{name} is for a comparison of logits; add --logits OTHER, or leave it out")
    return options


if __name__ == "__main__":
    sys.exit(script_main(main))
