"""Export a checkpoint, ours or upstream GPT-NeoX's, to Hugging Face's format.

python tools/ckpts/convert_neox_to_hf.py --input_dir RUN/global_step1000 --output_dir out --precision bf16
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.choices import ARCHITECTURES
from neox.launch.arguments import Parser
from neox.launch.main import script_main
from neox.launch.options import natural
from neox.results import print_result


def main(arguments: list[str]) -> None:
    """Export, and compare with transformers."""
    options = _parse(arguments)
    from neox.checkpoint.conversion.export import Export, export
    from neox.checkpoint.described import open_described

    weights, config = open_described(options.input_dir, options.config_file)
    asked = Export(
        precision=options.precision,
        architecture=options.architecture,
        save_tokenizer=not options.no_save_tokenizer,
        tokenizer_is_huggingface=options.vocab_is_hf_tokenizer,
        pad_token_id=options.pad_token_id,
        check=options.check,
        dry_run=options.dry_run,
    )
    for line in export(weights, config, options.output_dir, asked):
        print_result(line)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input_dir", type=Path, required=True, help="a checkpoint of any known format, or a folder with `latest`")
    add("--config_file", nargs="+", default=(), help="configuration of the training run; default: the checkpoint's own")
    add("--output_dir", type=Path, required=True, help="folder to make")
    add("--precision", choices=("auto", "fp16", "bf16", "fp32"), default="auto", help="auto: the run's")
    add("--no_save_tokenizer", action="store_true", help="leave the tokenizer out")
    add("--vocab-is-hf-tokenizer", action="store_true", help="vocab_file is a folder that transformers saved")
    add("--pad-token-id", type=natural, help="padding token, if the tokenizer's is wrong")
    add("--architecture", choices=ARCHITECTURES, help="class in transformers; default: the one that fits")
    add("--check", action=argparse.BooleanOptionalAction, default=True, help="compare with transformers")
    add("--dry-run", action="store_true", help="list the files with the bytes of their weights, and write nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(script_main(main))
