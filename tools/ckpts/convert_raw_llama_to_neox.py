"""Import Llama as Meta releases it (params.json, consolidated.NN.pth) as a checkpoint to train on from.

python tools/ckpts/convert_raw_llama_to_neox.py --input_dir llama --model_size 7B --output_dir checkpoints
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.launch.arguments import Parser
from neox.launch.main import script_main
from neox.results import print_result

ANY_LAYOUT = "accepted as in GPT-NeoX and without effect: the checkpoint loads at any layout"


def main(arguments: list[str]) -> None:
    """Write the configuration, then the checkpoint it describes."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input_dir", type=Path, required=True, help="folder with params.json, or with one such folder for each size")
    add("--model_size", default="", help="name of the folder in INPUT_DIR, 7B say, where it holds several")
    add("--output_dir", type=Path, required=True, help="folder of checkpoints; gets global_step0 and latest")
    add("--config_file", type=Path, help="YAML to write; default: OUTPUT_DIR/model.yml")
    add("--precision", choices=("fp16", "bf16", "bfloat16", "fp32"), help="default: the type of the weights")
    add("--num_output_shards", type=int, help=ANY_LAYOUT)
    add("--pipeline_parallel", action="store_true", help=ANY_LAYOUT)
    add("--dry-run", action="store_true", help="list the files with the bytes of their weights, and write nothing")
    options = parser.parse_args(arguments)
    from neox.checkpoint.conversion.imports import import_model
    from neox.checkpoint.meta_llama import PARAMS, MetaLlamaReader

    has_sizes = not (options.input_dir / PARAMS).is_file()
    reader = MetaLlamaReader(options.input_dir / options.model_size if has_sizes else options.input_dir)
    path = options.config_file or options.output_dir / "model.yml"
    for line in import_model(
        reader, options.output_dir, config_file=path, precision=options.precision, dry_run=options.dry_run
    ):
        print_result(line)


if __name__ == "__main__":
    sys.exit(script_main(main))
