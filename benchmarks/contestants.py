"""What is timed: one optimizer step of ours and of the peer, on the same weights and the same tokens.

All of them start from the same initial weights, predict the same labels, clip the gradient to norm 1 and take a
step of AdamW with the same coefficients, so their first losses are equal; a test holds them to that.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from neox.checkpoint.huggingface.gpt_neox import GPT_NEOX
from neox.config import Config
from neox.launch.environment import export
from neox.launch.local import single_placement
from neox.model.build import build_decoder, fresh_weights, meta_decoder
from neox.model.layers import Decoder
from neox.parallel.mesh import Mesh, build_mesh
from neox.training.batches import GlobalBatch, global_batch, micro_batch
from neox.training.optimizers.build import build_optimizer
from neox.training.plain import PlainEngine


class Contestant(Protocol):
    """Something that trains a model."""

    name: str
    model: nn.Module

    def step(self, tokens_BS1: torch.Tensor) -> torch.Tensor:
        """Forward, backward, clip, update; return the loss of int64 tokens [B, S+1], fp32 scalar."""
        ...


@contextmanager
def single_process(config: Config) -> Iterator[Mesh]:
    """A process group of one, as a run of one process has it. DeepSpeed remembers it: one in a process's life."""
    export(single_placement(), os.environ)
    try:
        yield build_mesh(config)
    finally:
        dist.destroy_process_group()


def _batch(tokens_BS1: torch.Tensor, mesh: Mesh) -> GlobalBatch:
    return global_batch([micro_batch({"tokens": tokens_BS1}, device=mesh.device, mask_after=None)], mesh)


class Engine:
    """The product: what `train.py` runs, DeepSpeed included."""

    name = "neox"

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.mesh = mesh
        self.engine = PlainEngine(config, mesh, fresh_weights(config))
        self.model: nn.Module = self.engine.deepspeed.module

    def step(self, tokens_BS1: torch.Tensor) -> torch.Tensor:
        """See Contestant."""
        return self.engine.train_step(_batch(tokens_BS1, self.mesh))


class Bare:
    """Our model and optimizer without the engine; fp32 only. The difference to `Engine` is DeepSpeed's cost."""

    name = "neox, no engine"

    def __init__(self, config: Config, device: torch.device) -> None:
        self.mesh = Mesh(device=device)
        self.model: Decoder = build_decoder(config.model, source=fresh_weights(config), mesh=self.mesh)
        self.optimizer = build_optimizer(self.model.named_parameters(), config)
        self.clip = config.optimizer.gradient_clipping

    def step(self, tokens_BS1: torch.Tensor) -> torch.Tensor:
        """See Contestant."""
        (inputs,) = _batch(tokens_BS1, self.mesh).micro_batches
        loss = self.model(inputs.tokens_BS, inputs.targets)
        return _update(loss, self.model, self.optimizer, self.clip)


class Transformers:
    """GPTNeoXForCausalLM of Hugging Face's `transformers`, trained as its users do.

    SDPA attention, its own loss, torch's fused AdamW, `clip_grad_norm_`. With `autocast` the weights stay in fp32
    and products run in bf16 (torch.autocast), which is what its Trainer does for `bf16: true`. With `compiled` the
    whole model goes through torch.compile.
    """

    name = "transformers"

    def __init__(self, config: Config, device: torch.device, *, autocast: bool = False, compiled: bool = False) -> None:
        self.device = device
        self.autocast = autocast
        self.model = _transformers_twin(config).to(device)
        self.run: Callable = torch.compile(self.model) if compiled else self.model
        self.optimizer = build_peer_optimizer(self.model, config)
        self.clip = config.optimizer.gradient_clipping

    def step(self, tokens_BS1: torch.Tensor) -> torch.Tensor:
        """See Contestant."""
        rows = tokens_BS1.to(self.device)
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.run(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss
        return _update(loss, self.model, self.optimizer, self.clip)


def _update(loss: torch.Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> torch.Tensor:
    """Backward, clip and step as torch's own tools do it."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def build_peer_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Torch's AdamW in its fused form; matrices decay, vectors do not, as in ours."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    settings = config.optimizer
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True, **settings.params)


def _transformers_twin(config: Config) -> nn.Module:
    """The same model with the same initial weights, fp32, in training mode."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    settings = GPT_NEOX.config_json(config.model, dtype="float32", tokens={"bos_token_id": 0, "eos_token_id": 0})
    model = GPTNeoXForCausalLM._from_config(GPTNeoXConfig(**settings), attn_implementation="sdpa")
    theirs = {name.replace("lm_head", "embed_out"): p for name, p in model.named_parameters()}
    ours = fresh_weights(config)
    for name, parameter in meta_decoder(config.model).named_parameters():
        (place,), _ = GPT_NEOX.locate(name, config.model)
        twin = theirs.pop(place)
        with torch.no_grad():
            twin.copy_(ours(name, parameter.shape))
    assert not theirs, f"parameters of the peer that ours does not have: {sorted(theirs)}"
    return model.train()
