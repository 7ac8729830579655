"""Evaluate a trained model with lm-evaluation-harness.

python evaluate.py configs/small.yml configs/local_setup.yml load=checkpoints --eval_tasks lambada_openai piqa
python evaluate.py CONFIG... --eval_tasks my_tasks/quiz.yaml        a task of your own; a folder works too
torchrun --nproc-per-node 8 evaluate.py CONFIG... --eval_tasks piqa           8 GPUs share the documents
srun --ntasks-per-node 8 --gpus-per-node 8 python evaluate.py CONFIG... --eval_tasks piqa        Slurm
"""

import os
import sys

from neox.launch.arguments import parse_arguments
from neox.launch.environment import detect, export
from neox.launch.local import run_local
from neox.launch.main import leave, script_main
from neox.launch.reporting import print_notices


def main(argv: list[str]) -> int:
    """Run as the rank we are, or start a copy of the model for all GPUs of this machine."""
    arguments = parse_arguments("evaluate", argv)
    placement = detect(os.environ)
    config = arguments.load()
    print_notices(config.notices, placement)

    from neox.evaluation.run import run_evaluation
    from neox.inference.session import join, replica_workers, without_pipeline

    config = without_pipeline(config)
    if placement is None:
        workers = replica_workers(config, copies=True)
        if workers > 1:
            return run_local([sys.argv[0], *argv], workers=workers, environ=os.environ)
    else:
        export(placement, os.environ)
    with join(config, placement) as mesh:
        run_evaluation(config, mesh)
    return 0


if __name__ == "__main__":
    leave(script_main(main))
