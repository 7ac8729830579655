"""Import a model of Hugging Face (GPTNeoX, Llama, Mistral, Falcon, OPT, BLOOM, GPT-2) as a checkpoint to train on from.

python tools/ckpts/convert_hf_to_neox.py --hf_dir pythia-160m --output_dir checkpoints --config_file model.yml
"""

import argparse
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.checkpoint.convert import write_native
from neox.checkpoint.huggingface import HuggingFaceReader
from neox.config import load_config
from neox.launch.main import script_main


def main(arguments: list[str]) -> None:
    """Write the configuration, then the checkpoint it describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hf_dir", "--model_path", type=Path, required=True, help="folder with config.json and the weights")
    add("--output_dir", type=Path, required=True, help="folder of checkpoints; gets global_step0 and latest")
    add("--config_file", type=Path, help="YAML to write; default: OUTPUT_DIR/model.yml")
    add("--precision", choices=("fp16", "bfloat16", "fp32"), help="default: the type of the weights")
    options = parser.parse_args(arguments)
    reader = HuggingFaceReader(options.hf_dir)
    keys = reader.config_keys() | ({"precision": options.precision} if options.precision else {})
    tokenizer = options.hf_dir / "tokenizer.json"
    if tokenizer.is_file():
        keys |= {"tokenizer_type": "HFTokenizer", "vocab_file": str(tokenizer.resolve())}
    path = options.config_file or options.output_dir / "model.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    folder = write_native(reader, load_config([path]), options.output_dir)
    print(f"{folder}: {reader.folder} in {keys['precision']}, configuration in {path}")


if __name__ == "__main__":
    sys.exit(script_main(main))
