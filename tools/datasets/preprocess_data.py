"""Tokenize text into the .bin/.idx files that training reads.

    python tools/datasets/preprocess_data.py --input corpus.jsonl.zst --output-prefix data/corpus \
        --tokenizer-type HFTokenizer --vocab-file 20B_tokenizer.json --append-eod --workers 8

writes data/corpus_text_document.bin and .idx; give `data_path: data/corpus_text_document` to train.py.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.choices import TOKENIZER_TYPES
from neox.launch.arguments import Parser
from neox.launch.main import script_main
from neox.launch.options import positive
from neox.results import print_result

if TYPE_CHECKING:
    from neox.data.preprocess import PreprocessOptions


def parse_arguments(argv: list[str]) -> "PreprocessOptions":
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help=".jsonl or .txt (or .gz, .zst) files or folders, commas allowed",
    )
    add("--jsonl-keys", nargs="+", default=["text"], help="fields to tokenize, each to its own files")
    add("--num-docs", type=positive, help="stop after so many documents")
    add("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    add("--vocab-file", help="vocabulary, model or JSON file of the tokenizer")
    add("--merge-file", help="merges, for GPT2BPETokenizer")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--ftfy", action="store_true", help="fix broken Unicode first")
    add("--output-prefix", required=True, help="path without '_<key>_document.bin'")
    add("--dataset-impl", default="mmap", choices=["mmap"], help="format of the index; only mmap is written")
    add("--workers", type=positive, default=1, help="processes that tokenize")
    add("--log-interval", type=positive, default=1000, help="documents between updates of the progress bar")
    options = vars(parser.parse_args(argv))
    del options["dataset_impl"]
    from neox.data.documents import input_paths
    from neox.data.preprocess import PreprocessOptions

    return PreprocessOptions(inputs=input_paths(options.pop("input")), **options)


def main(argv: list[str]) -> None:
    """Tokenize, and say what was written."""
    options = parse_arguments(argv)
    from neox.data.preprocess import preprocess
    from neox.data.text_files import replaced_line

    summary = preprocess(options)
    for key, prefix in summary.prefixes.items():
        print_result(f"{prefix}.bin: {summary.documents:,} documents, {summary.tokens[key]:,} tokens")
    if summary.empty:
        print_result(f"{summary.empty:,} documents without text were skipped")
    if summary.replaced:
        print_result(replaced_line(summary.replaced))


if __name__ == "__main__":
    sys.exit(script_main(main))
