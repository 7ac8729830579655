"""Tokenize conversations into documents, labels and rewards: for fine-tuning, dpo, rm and kto.

    python tools/datasets/preprocess_data_with_chat_template.py --input pairs.jsonl --output-prefix data/train \
        --tokenizer-path chat-model --jsonl-keys chosen rejected --only-last

writes data/train_chosen_document and data/train_chosen_label_document, and the same for rejected; with --reward-key
also data/train_<key>_reward_document. A line holds {"chosen": [{"role": "user", "content": "..."}...], ...}; the turns
(or the text) of its field "prompt", if it has one, come before each of its conversations.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.launch.arguments import Parser
from neox.launch.main import script_main
from neox.launch.options import positive
from neox.results import print_result

if TYPE_CHECKING:
    from neox.data.chat import ChatOptions


def parse_arguments(argv: list[str]) -> "ChatOptions":
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=".jsonl (or .gz, .zst) files or folders, commas allowed")
    add("--jsonl-keys", nargs="+", default=["conversation"], help="fields with conversations, each to its own files")
    add("--tokenizer-path", required=True, help="folder or name of a Hugging Face tokenizer with a chat template")
    add("--no-mask", action="store_true", help="label every token")
    add("--for-rm", action="store_true", help="label the end only, where a reward model gives its reward")
    add("--generation-role", default="assistant", help="whose turns are labelled")
    add("--only-last", action="store_true", help="label the last turn only")
    add("--reward-key", help="field with the reward of a line")
    add("--binary-reward", action="store_true", help="1 for a reward above 0 or true, else -1")
    add("--num-docs", type=positive, help="stop after so many lines")
    add("--ftfy", action="store_true", help="fix broken Unicode first")
    add("--output-prefix", required=True, help="path without '_<key>_document.bin'")
    add("--dataset-impl", default="mmap", choices=["mmap"], help="format of the index; only mmap is written")
    add("--workers", type=positive, default=1, help="accepted; the tokenizer uses threads of its own")
    add("--log-interval", type=positive, default=1000, help="lines between updates of the progress bar")
    options = vars(parser.parse_args(argv))
    clashes = (("no_mask", "for_rm"), ("no_mask", "only_last"), ("for_rm", "only_last"))
    for flags in (pair for pair in clashes if all(options[flag] for flag in pair)):
        one, other = (f"--{flag.replace('_', '-')}" for flag in flags)
        parser.error(f"{one} and {other} label different tokens; leave one of them out")
    if options["binary_reward"] and options["reward_key"] is None:
        parser.error("--binary-reward is about the rewards of --reward-key; name their field, or leave it out")
    del options["dataset_impl"], options["workers"]
    from neox.data.chat import ChatOptions
    from neox.data.documents import input_paths

    return ChatOptions(inputs=input_paths(options.pop("input")), **options)


def main(argv: list[str]) -> None:
    """Tokenize, and say what was written."""
    options = parse_arguments(argv)
    from neox.data.chat import preprocess_chat
    from neox.data.text_files import SurrogateFilter, replaced_line

    clean = SurrogateFilter()
    for prefix, summary in preprocess_chat(options, clean).items():
        print_result(f"{prefix}.bin: {summary.labelled:,} labelled tokens")
        for warning in summary.warnings():
            print(f"{prefix}: {warning}", file=sys.stderr)
    if clean.documents:
        print_result(replaced_line(clean.documents))


if __name__ == "__main__":
    sys.exit(script_main(main))
