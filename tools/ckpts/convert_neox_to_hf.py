"""Export a checkpoint, ours or upstream GPT-NeoX's, to Hugging Face's format.

python tools/ckpts/convert_neox_to_hf.py --input_dir RUN/global_step1000 --config_file model.yml --output_dir out
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.checkpoint.convert import largest_logit_difference
from neox.checkpoint.huggingface import FAMILIES, export_huggingface, family_of
from neox.checkpoint.lora import merged
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.tokenizer_files import export_tokenizer
from neox.config import load_config
from neox.launch.main import script_main
from neox.model.build import DTYPES


def main(arguments: list[str]) -> None:
    """Export, and compare with transformers."""
    options = _parse(arguments)
    config = load_config(options.config_file)
    weights = merged(open_checkpoint(options.input_dir, gpt_j_residual=config.model.gpt_j_residual))
    model = config.with_vocabulary(weights.padded_vocab_size).model
    precision = {"auto": model.precision, "bf16": "bfloat16"}.get(options.precision, options.precision)
    tokenizer = None
    if not options.no_save_tokenizer:
        tokenizer = export_tokenizer(
            config.tokenizer,
            from_huggingface=options.vocab_is_hf_tokenizer,
            pad_token_id=options.pad_token_id,
            model_max_length=model.max_position_embeddings,
        )
    family = family_of(model, options.architecture)
    export_huggingface(
        weights,
        model,
        options.output_dir,
        dtype=DTYPES[precision],
        architecture=family.name,
        tokenizer=tokenizer,
    )
    print(f"{options.output_dir}: {weights.folder} as {family.architecture} in {precision}")
    if options.check:
        difference = largest_logit_difference(options.output_dir, weights, model, dtype=DTYPES[precision])
        print(f"largest logit difference to transformers: {difference:.3g}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input_dir", type=Path, required=True, help="a global_step<N> folder, or a folder with `latest`")
    add("--config_file", nargs="+", required=True, help="configuration of the training run")
    add("--output_dir", type=Path, required=True, help="folder to make")
    add("--precision", choices=("auto", "fp16", "bf16", "fp32"), default="auto", help="auto: the run's")
    add("--no_save_tokenizer", action="store_true", help="leave the tokenizer out")
    add("--vocab-is-hf-tokenizer", action="store_true", help="vocab_file is a folder that transformers saved")
    add("--pad-token-id", type=int, help="padding token, if the tokenizer's is wrong")
    add("--architecture", choices=tuple(FAMILIES), help="class in transformers; default: the one that fits")
    add("--check", action=argparse.BooleanOptionalAction, default=True, help="compare with transformers")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(script_main(main))
