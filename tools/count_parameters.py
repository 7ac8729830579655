"""Count the parameters of a model before anything is allocated.

python tools/count_parameters.py configs/20B.yml
python tools/count_parameters.py configs/pythia/160M.yml num_layers=24 --json
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox.launch.arguments import Parser
from neox.launch.main import script_main
from neox.results import print_result


def main(arguments: list[str]) -> None:
    """Print the counts as a table or as JSON."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIGS", help="configuration files and key=value overrides")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--override", action="append", default=[], metavar="FILE", help="a file of overrides")
    options = parser.parse_intermixed_args(arguments)
    from neox.config import load_config, split_overrides
    from neox.launch.reporting import print_notices
    from neox.model.count import count_parameters
    from neox.model.flops import flops_per_token
    from neox.training.vocabulary import settle_vocabulary

    files, overrides = split_overrides(options.configs)
    config = load_config(files, overrides=overrides, override_files=options.override)
    print_notices(config.replaced, None)
    model = settle_vocabulary(config).model
    count = count_parameters(model)
    figures = {
        "total": count.total,
        "non_embedding": count.non_embedding,
        "active": count.active,
        "padded_vocab_size": model.padded_vocab_size,
        "train_flops_per_token": flops_per_token(model, causal=False, frozen=config.lora.is_on).model,
        "per_layer": count.per_layer,
    }
    if options.json:
        print_result(json.dumps(figures))
        return
    print_result(f"total                  {count.total:>18,}")
    print_result(f"without embeddings     {count.non_embedding:>18,}")
    if model.has_experts:
        print_result(f"active for a token     {count.active:>18,}")
    print_result(f"padded vocabulary      {model.padded_vocab_size:>18,}")
    print_result(
        f"training FLOPs/token   {figures['train_flops_per_token']:>18.4g}  (full attention, no recomputation)"
    )
    for index, parameters in count.per_layer.items():
        print_result(f"layer {index:<4}             {parameters:>18,}")


if __name__ == "__main__":
    sys.exit(script_main(main))
