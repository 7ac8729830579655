"""Compute the logits of a checkpoint of any format on given tokens: what shows whether a conversion is right.

python tools/ckpts/logits.py RUN/global_step1000 --tokens ids.npy --out logits.npy
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


def main(arguments: list[str]) -> None:
    """Read ids [B, S], write fp32 logits [B, S, V]; V is the padded vocabulary of the checkpoint."""
    options = _parse(arguments)
    from neox.checkpoint.described import open_described
    from neox.checkpoint.inspection.logits import check_tokens, read_tokens, streamed_logits, write_logits
    from neox.files import require_apart

    require_apart(options.out, [options.tokens])
    tokens_BS = read_tokens(options.tokens)
    weights, config = open_described(options.checkpoint, options.config_file)
    check_tokens(tokens_BS, config.model)
    shape = (*tokens_BS.shape, weights.padded_vocab_size)
    size = 4 * shape[0] * shape[1] * shape[2]
    summary = f"{options.out}: logits {list(shape)} in fp32, {size:,} bytes, of {weights.folder}"
    if options.dry_run:
        print_result(f"would write {summary}")
        return
    logits = streamed_logits(weights, config.model, tokens_BS, batch_size=options.batch_size)
    write_logits(options.out, logits, shape)
    print_result(summary)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint of any known format, or a folder of them")
    add("--tokens", type=Path, required=True, metavar="FILE", help=".npy with integer ids [B, S] or [S]")
    add("--out", type=Path, required=True, metavar="FILE", help=".npy to write")
    add("--config_file", nargs="+", default=(), metavar="FILE", help="model; default: what the checkpoint says")
    add(
        "--batch_size",
        type=positive,
        default=LOGITS_BATCH_SIZE,
        help="sequences computed together (default: %(default)s)",
    )
    add("--dry-run", action="store_true", help="say what would be read and written, and write nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(script_main(main))
