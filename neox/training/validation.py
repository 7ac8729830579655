"""Loss on held-out data while a model trains."""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist

from neox.config import Config
from neox.data import Tokenizer
from neox.data.blending import SampleSource
from neox.data.online import OnlineDataset
from neox.training.batches import BatchMaker, GlobalBatch
from neox.training.engine import Engine
from neox.training.loaders import micro_batches
from neox.training.metrics.loggers import MetricLog
from neox.training.team import tell
from neox.watch import phase


@dataclass(frozen=True)
class Evaluator:
    """Runs `eval_iters` batches of a dataset through the model.

    Attributes:
        name: "validation" or "test".
        engine: the model.
        dataset: held-out samples.
        batches: makes the batches.
        tokenizer: given where the perplexity per character is asked for (`char_level_ppl`).
    """

    name: str
    engine: Engine
    dataset: SampleSource | OnlineDataset
    batches: BatchMaker
    tokenizer: Tokenizer | None = None

    def report(self, log: MetricLog, iteration: int, number: int) -> None:
        """Log evaluation `number`, or say that there is nothing to measure."""
        figures = self.run(number)
        if figures:
            log.log(iteration, {f"{self.name}/{name}": value for name, value in figures.items()})
        else:
            tell(self.engine.mesh, f"{self.name} at iteration {iteration}: no labelled token, so there is no loss")

    @phase("evaluating")
    def run(self, number: int) -> dict[str, float]:
        """Evaluation `number` (0, 1, ...) of the run, on samples of its own as upstream reads them.

        Returns:
            `lm_loss`, nats per token over all unmasked tokens of all batches; `lm_loss_ppl`, its exponential; and
            where asked for `lm_loss_char_lvl_ppl`, exp(lm_loss x tokens / characters). Of another objective (see
            `train_impl`) its loss, and means of what it measures. Nothing where no token is labelled.
        """
        config, mesh = self.engine.config, self.engine.mesh
        per_evaluation = config.training.eval_iters * config.batch.train_batch_size
        loader = micro_batches(self.dataset, config, mesh, start=number * per_evaluation)
        loss = torch.zeros((), device=mesh.device)
        measured: defaultdict[str, torch.Tensor] = defaultdict(lambda: torch.zeros_like(loss))
        tokens, characters = torch.zeros_like(loss), torch.zeros_like(loss)
        for _ in range(config.training.eval_iters):
            batch = self.batches.next(loader)
            loss += self.engine.evaluate(batch) * batch.token_count
            for name, value in self.engine.figures.items():
                measured[name] += value / config.training.eval_iters
            tokens += batch.token_count
            characters += self._characters(batch)
        if tokens == 0:
            return {}
        mean = float(loss / tokens)
        if config.preference.is_on:  # no perplexity then
            return {"lm_loss": mean} | {name: float(value) for name, value in measured.items()}
        figures = {"lm_loss": mean, "lm_loss_ppl": perplexity(mean)}
        if self.tokenizer is not None and characters > 0:
            figures["lm_loss_char_lvl_ppl"] = perplexity(float(loss / characters))
        return figures

    def _characters(self, batch: GlobalBatch) -> torch.Tensor:
        """Characters of the predicted text over all data-parallel ranks, fp32 scalar."""
        mesh = self.engine.mesh
        count = torch.zeros((), device=mesh.device)
        if self.tokenizer is None:
            return count
        for _, targets, *_ in batch.micro_batches:
            for labels, weights in zip(targets.labels_BS, targets.weights_BS, strict=True):
                count += len(self.tokenizer.detokenize(labels[weights > 0].tolist()))
        if mesh.data_size > 1:
            dist.all_reduce(count, group=mesh.data_group)
        return count


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.inf if loss >= 700.0 else math.exp(loss)


def evaluations_before(config: Config, iteration: int) -> int:
    """How many evaluations a run has made before this iteration's."""
    return max(0, iteration - 1) // config.training.eval_interval
