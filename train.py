"""Train a model.

python train.py configs/pythia/160M.yml configs/local_setup.yml          this machine: all GPUs, or the CPU
python train.py -d configs pythia/160M local_setup                      upstream's spelling
python train.py configs/small.yml configs/local_setup.yml optimizer.params.lr=3e-4 train_iters=100
python train.py configs/small.yml configs/local_setup.yml --override mine.yml      a file of overrides
torchrun --nproc-per-node 8 train.py CONFIG...                          8 GPUs under torchrun
srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python train.py CONFIG...     Slurm
"""

import os
import subprocess
import sys

from neox.launch.arguments import parse_arguments
from neox.launch.environment import detect, export
from neox.launch.hosts import deepspeed_command, slots, wants_launcher
from neox.launch.local import local_worker_count, run_local, single_placement
from neox.launch.main import leave, script_main
from neox.launch.reporting import print_notices


def main(argv: list[str]) -> int:
    """Check everything that can be checked here, then run as the rank we are or start the ranks."""
    arguments = parse_arguments("train", argv)
    from neox.config import check_training

    placement = detect(os.environ)
    config = arguments.load(world_size=placement.world_size if placement else None)
    check_training(config)
    from neox.training.preflight import prepare, remarks
    from neox.training.run import cuda_device_count, train

    workers = 1
    if placement is None:
        workers = slots(config) or local_worker_count(config, cuda_device_count())
        config = config.with_world_size(workers)
        check_training(config)
    config = prepare(config)
    print_notices(remarks(config), placement)
    if placement is None:
        command = [sys.argv[0], *argv]
        if wants_launcher(config):
            return subprocess.call(deepspeed_command(config, command))
        if workers > 1:
            return run_local(command, workers=workers, environ=os.environ)
        placement = single_placement()
    export(placement, os.environ)
    train(config)
    return 0


if __name__ == "__main__":
    leave(script_main(main))
