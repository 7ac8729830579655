"""Train a model.

python train.py configs/pythia/160M.yml configs/local_setup.yml          this machine: all GPUs, or the CPU
python train.py -d configs pythia/160M local_setup                      upstream's spelling
python train.py configs/small.yml configs/local_setup.yml optimizer.params.lr=3e-4 train_iters=100
python train.py configs/small.yml configs/local_setup.yml --override mine.yml      a file of overrides
torchrun --nproc-per-node 8 train.py CONFIG...                          8 GPUs under torchrun
srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python train.py CONFIG...     Slurm
"""

import os
import sys
from itertools import chain

from neox.launch.arguments import parse_arguments
from neox.launch.endings import EarlySignals
from neox.launch.environment import describe, detect
from neox.launch.local import local_worker_count, single_placement
from neox.launch.main import leave, script_main
from neox.launch.meeting import enter
from neox.launch.reporting import print_notices
from neox.launch.restarts import Restarts
from neox.launch.start import Start


def main(argv: list[str]) -> int:
    """Check everything that can be checked here, then run as the rank we are or start the ranks."""
    with EarlySignals() as signals:
        arguments = parse_arguments("train", argv)
        from neox.checkpoint.load import read_loaded_model
        from neox.config import check_training

        placement = detect(os.environ)
        world_size = placement.world_size if placement else None
        config = arguments.load(world_size=world_size, read_model=read_loaded_model)
        check_training(config)
        signals.answer_with(config.reliability.requeue_status)
        from neox.training.preflight import prepare, remarks
        from neox.training.run import cuda_device_count, train

        start = None
        if placement is None:
            workers = local_worker_count(config, cuda_device_count())
            start = Start(config, workers=workers, restarts=Restarts.of(config))
            config = config.with_world_size(start.world_size)
            check_training(config)
        config = prepare(config)
        first = start.description if start else describe(placement)
        print_notices(chain([first], remarks(config)), placement)
        if start is None or start.is_alone:
            enter(placement or single_placement())
    if start is not None and not start.is_alone:
        return start.run([sys.argv[0], *argv])
    return train(config).status


if __name__ == "__main__":
    leave(script_main(main))
