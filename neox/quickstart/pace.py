"""How many steps of training fit into the time of the quickstart on this machine."""

import time

import torch

from neox.config import Config
from neox.model.build import build_decoder, fresh_weights
from neox.model.loss import Targets
from neox.parallel.mesh import Mesh
from neox.training.optimizers.build import build_optimizer

WARMUP_STEPS, TIMED_STEPS = 3, 15
ENGINE_SHARE = 1.1  # what data, engine, evaluations and logs add to a bare step


def affordable_steps(config: Config, seconds: float) -> int:
    """Time a few bare steps of the model on random tokens, and return how many steps of training take `seconds`.

    Args:
        config: model, batch and optimizer, the vocabulary resolved.
        seconds: for training.

    Returns:
        At most `train_iters`, and at least a tenth of it.
    """
    wanted = config.training.train_iters
    assert wanted is not None, "the quickstart trains for a number of steps"
    spent = _seconds_per_step(config) * ENGINE_SHARE
    return max(wanted // 10, min(wanted, int(seconds / spent)))


def _seconds_per_step(config: Config) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_decoder(config.model, source=fresh_weights(config), mesh=Mesh(device=device))
    optimizer = build_optimizer(model.named_parameters(), config, Mesh(device=device))
    shape = (config.batch.train_batch_size, config.model.seq_length)
    tokens_BS = torch.randint(config.model.padded_vocab_size or 1, shape, device=device)
    targets = Targets(tokens_BS, torch.full(shape, 1 / tokens_BS.numel(), device=device))
    for step in range(WARMUP_STEPS + TIMED_STEPS):
        if step == WARMUP_STEPS:
            start = _now(device)
        model(tokens_BS, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (_now(device) - start) / TIMED_STEPS


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
