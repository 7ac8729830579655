"""Write the checkpoint of a LoRA run as one without factors: W + (alpha / rank) B A in place of W.

python tools/ckpts/merge_lora.py --input_dir tuned --output_dir merged
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.errors import CheckpointError
from neox.launch.arguments import Parser
from neox.launch.main import script_main
from neox.results import print_result


def main(arguments: list[str]) -> None:
    """Merge, and say where the result is."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input_dir", type=Path, required=True, help="a global_step<N> folder, or a folder with `latest`")
    add("--config_file", nargs="+", default=(), help="configuration of the training run; default: the checkpoint's own")
    add("--output_dir", type=Path, required=True, help="folder of checkpoints; gets global_step0 and latest")
    add("--dry-run", action="store_true", help="list the files with the bytes of their weights, and write nothing")
    options = parser.parse_args(arguments)
    from neox.checkpoint.conversion.convert import native_files, write_native
    from neox.checkpoint.described import open_described
    from neox.checkpoint.lora import MergedWeights
    from neox.config import config_from_dict

    weights, config = open_described(options.input_dir, options.config_file)
    if not isinstance(weights, MergedWeights):
        raise CheckpointError(f"{weights.folder}: has no LoRA factors, so there is nothing to merge")
    plain = config_from_dict(config.to_flat() | {"lora": None}, world_size=None)
    config = plain.with_vocabulary(weights.padded_vocab_size)
    if options.dry_run:
        print_result(*(f"{size:>16,}  {name}" for name, size in native_files(config.model).items()), sep="\n")
        print_result(f"would write {options.output_dir / 'global_step0'}: {weights.folder} in {config.model.precision}")
        return
    folder = write_native(weights, config, options.output_dir)
    print_result(f"{folder}: {weights.folder} with its factors merged, in {config.model.precision}")


if __name__ == "__main__":
    sys.exit(script_main(main))
