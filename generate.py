"""Generate text from a trained model.

python generate.py configs/small.yml configs/local_setup.yml load=checkpoints -m 64 --temperature 0.8
python generate.py CONFIG... --text_gen_type input-file -i prompts.txt -o samples.jsonl
python generate.py CONFIG... --text_gen_type interactive
torchrun --nproc-per-node 8 generate.py CONFIG... -i prompts.txt        8 GPUs share the prompts
srun --ntasks-per-node 8 --gpus-per-node 8 python generate.py CONFIG... -i prompts.txt      Slurm
"""

import os
import sys

from neox.launch.arguments import parse_arguments
from neox.launch.environment import describe, detect
from neox.launch.main import leave, script_main
from neox.launch.meeting import enter
from neox.launch.reporting import print_notices
from neox.launch.start import Start


def main(argv: list[str]) -> int:
    """Run as the rank we are, or start the tensor-parallel ranks of this machine."""
    arguments = parse_arguments("generate", argv)
    placement = detect(os.environ)
    from neox.checkpoint.load import read_loaded_model

    config = arguments.load(read_model=read_loaded_model)

    from neox.inference.modes import run_generation
    from neox.inference.session import join, replica_workers, without_pipeline

    config = without_pipeline(config)
    start = Start(config, workers=replica_workers(config, copies=False)) if placement is None else None
    print_notices([start.description if start else describe(placement), *config.notices], placement)
    if start is not None and not start.is_alone:
        return start.run([sys.argv[0], *argv])
    if placement is not None:
        enter(placement)
    with join(config, placement) as mesh:
        run_generation(config, mesh)
    return 0


if __name__ == "__main__":
    leave(script_main(main))
