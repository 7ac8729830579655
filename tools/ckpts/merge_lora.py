"""Write the checkpoint of a LoRA run as one without factors: W + (alpha / rank) B A in place of W.

python tools/ckpts/merge_lora.py --input_dir tuned --config_file model.yml --output_dir merged
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.checkpoint.convert import write_native
from neox.checkpoint.lora import MergedWeights, merged
from neox.checkpoint.open import open_checkpoint
from neox.config import config_from_dict, load_config
from neox.errors import CheckpointError
from neox.launch.main import script_main


def main(arguments: list[str]) -> None:
    """Merge, and say where the result is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input_dir", type=Path, required=True, help="a global_step<N> folder, or a folder with `latest`")
    add("--config_file", nargs="+", required=True, help="configuration of the training run")
    add("--output_dir", type=Path, required=True, help="folder of checkpoints; gets global_step0 and latest")
    options = parser.parse_args(arguments)
    weights = merged(open_checkpoint(options.input_dir))
    if not isinstance(weights, MergedWeights):
        raise CheckpointError(f"{weights.folder}: has no LoRA factors, so there is nothing to merge")
    keys = load_config(options.config_file).to_flat() | {"lora": None}
    config = config_from_dict(keys, world_size=None).with_vocabulary(weights.padded_vocab_size)
    folder = write_native(weights, config, options.output_dir)
    print(f"{folder}: {weights.folder} with its factors merged, in {config.model.precision}")


if __name__ == "__main__":
    sys.exit(script_main(main))
