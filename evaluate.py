"""Evaluate a trained model with lm-evaluation-harness.

python evaluate.py configs/small.yml configs/local_setup.yml load=checkpoints --eval_tasks lambada_openai piqa
python evaluate.py CONFIG... --eval_tasks my_tasks/quiz.yaml        a task of your own; a folder works too
torchrun --nproc-per-node 8 evaluate.py CONFIG... --eval_tasks piqa           8 GPUs share the documents
srun --ntasks-per-node 8 --gpus-per-node 8 python evaluate.py CONFIG... --eval_tasks piqa        Slurm
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
    """Run as the rank we are, or start a copy of the model for all GPUs of this machine."""
    arguments = parse_arguments("evaluate", argv)
    placement = detect(os.environ)
    from neox.checkpoint.load import read_loaded_model

    config = arguments.load(read_model=read_loaded_model)

    from neox.evaluation.run import run_evaluation
    from neox.inference.session import join, replica_workers, without_pipeline

    config = without_pipeline(config)
    start = Start(config, workers=replica_workers(config, copies=True)) if placement is None else None
    print_notices([start.description if start else describe(placement), *config.notices], placement)
    if start is not None and not start.is_alone:
        return start.run([sys.argv[0], *argv])
    if placement is not None:
        enter(placement)
    with join(config, placement) as mesh:
        run_evaluation(config, mesh)
    return 0


if __name__ == "__main__":
    leave(script_main(main))
