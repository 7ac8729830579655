"""Train a byte-level BPE tokenizer; token 0 is <|endoftext|>, token 1 <|padding|>.

    python tools/datasets/train_tokenizer.py --input corpus.jsonl --output tokenizer.json --vocab-size 32000

The file is for `tokenizer_type: HFTokenizer` with `vocab_file: tokenizer.json`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.launch.arguments import Parser
from neox.launch.main import script_main
from neox.launch.options import positive
from neox.results import print_result


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help=".jsonl or .txt (or .gz, .zst) files or folders, commas allowed",
    )
    add("--output", required=True, help="JSON file to write")
    add("--vocab-size", type=positive, required=True, help="tokens in all, special ones included")
    add("--jsonl-key", default="text", help="field of JSON lines to train on")
    add("--no-nfkc", action="store_true", help="leave text as it is, rather than normalize it to NFKC")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Train, write, and say what was written."""
    arguments = parse_arguments(argv)
    from neox.data.documents import input_files, input_paths
    from neox.data.text_files import SurrogateFilter, replaced_line
    from neox.data.tokenizers.train import save_tokenizer, train_bpe
    from neox.files import require_apart, require_place

    require_apart(Path(arguments.output), input_files(input_paths(arguments.input)))
    require_place(Path(arguments.output))
    clean = SurrogateFilter()
    tokenizer = train_bpe(
        input_paths(arguments.input),
        vocab_size=arguments.vocab_size,
        jsonl_key=arguments.jsonl_key,
        nfkc=not arguments.no_nfkc,
        progress=sys.stderr.isatty(),
        clean=clean,
    )
    save_tokenizer(tokenizer, arguments.output)
    print_result(f"{arguments.output}: {tokenizer.get_vocab_size():,} tokens")
    if clean.documents:
        print_result(replaced_line(clean.documents))


if __name__ == "__main__":
    sys.exit(script_main(main))
