"""Import a model of Hugging Face (GPTNeoX, Llama, Mistral, Falcon, OPT, BLOOM, GPT-2) as a checkpoint to train on from.

python tools/ckpts/convert_hf_to_neox.py --hf_dir pythia-160m --output_dir checkpoints --config_file model.yml
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.launch.arguments import Parser
from neox.launch.main import script_main
from neox.results import print_result


def main(arguments: list[str]) -> None:
    """Write the configuration, then the checkpoint it describes."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hf_dir", "--model", type=Path, required=True, help="folder with config.json and the weights")
    add("--output_dir", "--model_path", type=Path, required=True, help="gets global_step0 and latest")
    add("--config_file", type=Path, help="YAML to write; default: OUTPUT_DIR/model.yml")
    add("--precision", choices=("fp16", "bf16", "bfloat16", "fp32"), help="default: the type of the weights")
    add("--tp", "--pp", type=int, help="as in GPT-NeoX and without effect: the checkpoint loads at any layout")
    add("--dry-run", action="store_true", help="list the files with the bytes of their weights, and write nothing")
    options = parser.parse_args(arguments)
    from neox.checkpoint.conversion.imports import import_model
    from neox.checkpoint.huggingface import HuggingFaceReader

    reader = HuggingFaceReader(options.hf_dir)
    path = options.config_file or options.output_dir / "model.yml"
    for line in import_model(
        reader, options.output_dir, config_file=path, precision=options.precision, dry_run=options.dry_run
    ):
        print_result(line)


if __name__ == "__main__":
    sys.exit(script_main(main))
