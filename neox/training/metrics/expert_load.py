"""How evenly the tokens of a model with experts are spread over them."""

import torch
import torch.distributed as dist

from neox.checkpoint.native.manifest import Progress
from neox.model.experts import Experts
from neox.training.engine import Engine
from neox.training.loop import Step
from neox.training.metrics.loggers import MetricLog


class ExpertLoad:
    """Logs the tokens of the busiest expert of a block over those of an even share, 1 at best.

    Of the last micro-batch before a report, as a mean over the blocks with experts and all ranks.
    """

    def __init__(self, engine: Engine, log: MetricLog) -> None:
        self.engine, self.log = engine, log

    def before_training(self, progress: Progress) -> None:
        """Nothing to do."""

    def after_step(self, step: Step) -> None:
        """Report when due; a collective over all ranks."""
        iteration = step.progress.iteration
        if iteration % self.engine.config.logging.log_interval == 0 or step.is_last:
            self.log.log(iteration, {"train/busiest_expert": busiest_expert(self.engine)})


def busiest_expert(engine: Engine) -> float:
    """What `ExpertLoad` logs; a collective over all ranks, of which some may have no block with experts."""
    total = torch.zeros(2, device=engine.mesh.device)
    for module in engine.deepspeed.module.modules():
        if isinstance(module, Experts):
            load_E = module.load_E
            assert load_E is not None, "every block has run in training"
            total += torch.stack((load_E.max() / load_E.float().mean(), torch.ones_like(total[0])))
    dist.all_reduce(total)
    return float(total[0] / total[1])
