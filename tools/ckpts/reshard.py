"""Write any checkpoint as GPT-NeoX lays it out at some tensor and pipeline size, or in this project's own format.

python tools/ckpts/reshard.py --input_dir RUN/global_step1000 --output_dir OUT --format pipeline --model_parallel_size 2

Training here needs none of it: `load` reads every format at every size.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.choices import FORMATS
from neox.launch.arguments import Parser
from neox.launch.main import script_main
from neox.launch.options import positive
from neox.results import print_result


def main(arguments: list[str]) -> None:
    """Reshard, or say what would be written."""
    options = _parse(arguments)
    from neox.checkpoint.conversion.reshard import Target, reshard
    from neox.checkpoint.described import open_described, progress_of

    target = Target(
        format=options.format,
        pipe=options.pipe_parallel_size,
        tensor=options.model_parallel_size,
        legacy=options.legacy_names,
        precision=options.precision,
    )
    weights, config = open_described(options.input_dir, options.config_file)
    written, files = reshard(
        weights, config, options.output_dir, target=target, progress=progress_of(weights), dry_run=options.dry_run
    )
    for name, size in files.items() if options.dry_run else ():
        print_result(f"{size:>16,}  {name}")
    does = "would write" if options.dry_run else "wrote"
    print_result(
        f"{does} {written}: {len(files)} files, {sum(files.values()):,} bytes of weights, from {weights.folder}"
    )


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input_dir", type=Path, required=True, help="a checkpoint of any known format, or a folder of them")
    add("--output_dir", type=Path, required=True, help="folder of checkpoints; gets global_step<N> and latest")
    add("--format", choices=FORMATS, required=True, help="sequential, pipeline: GPT-NeoX's; native: ours")
    add("--model_parallel_size", type=positive, default=1, metavar="N", help="tensor-parallel size (default: 1)")
    add("--pipe_parallel_size", type=positive, metavar="N", help="stages of the pipeline format (default: 1)")
    add("--legacy_names", action="store_true", help="dense_h_to_4h and w1, w2, w3, as before 2024-09")
    add("--precision", choices=("fp16", "bf16", "fp32"), help="type of the weights (default: the run's)")
    add("--config_file", nargs="+", default=(), help="configuration of the run; default: the checkpoint's own")
    add("--dry-run", action="store_true", help="list the files with the bytes of their weights, and write nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(script_main(main))
