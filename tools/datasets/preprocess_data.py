"""Tokenize text into the .bin/.idx files that training reads.

    python tools/datasets/preprocess_data.py --input corpus.jsonl.zst --output-prefix data/corpus \
        --tokenizer-type HFTokenizer --vocab-file 20B_tokenizer.json --append-eod --workers 8

writes data/corpus_text_document.bin and .idx; give `data_path: data/corpus_text_document` to train.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.data.preprocess import PreprocessOptions, preprocess
from neox.data.tokenizers import TOKENIZER_TYPES
from neox.launch.main import script_main


def parse_arguments(argv: list[str]) -> PreprocessOptions:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help=".jsonl or .txt (or .gz, .zst) files or folders, commas allowed",
    )
    add("--jsonl-keys", nargs="+", default=["text"], help="fields to tokenize, each to its own files")
    add("--num-docs", type=int, help="stop after so many documents")
    add("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    add("--vocab-file", help="vocabulary, model or JSON file of the tokenizer")
    add("--merge-file", help="merges, for GPT2BPETokenizer")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--ftfy", action="store_true", help="mend broken Unicode first")
    add("--output-prefix", required=True, help="path without '_<key>_document.bin'")
    add("--dataset-impl", default="mmap", choices=["mmap"], help="format of the index; only mmap is written")
    add("--workers", type=int, default=1, help="processes that tokenize")
    add("--log-interval", type=int, default=1000, help="documents between updates of the progress bar")
    options = vars(parser.parse_args(argv))
    del options["dataset_impl"]
    inputs = [path for group in options.pop("input") for path in group.split(",") if path]
    return PreprocessOptions(inputs=inputs, **options)


def main(argv: list[str]) -> None:
    """Tokenize, and say what was written."""
    summary = preprocess(parse_arguments(argv))
    for key, prefix in summary.prefixes.items():
        print(f"{prefix}.bin: {summary.documents:,} documents, {summary.tokens[key]:,} tokens")
    if summary.empty:
        print(f"{summary.empty:,} documents without text were passed over")


if __name__ == "__main__":
    sys.exit(script_main(main))
