"""An MLP of experts: a router sends each token to a few of them, and their outputs are added up by weight.

No token is dropped, however many want the same expert (as in MegaBlocks, Gale et al. 2022). Shapes beside the legend's:
M tokens of the micro-batch in one row, E experts, C experts chosen by a token (`moe_top_k`).
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from neox.config import ModelConfig
from neox.model.mlp import MLP

SINKHORN_STEPS = 30
"""Rounds of balancing; a fixed number, so that nothing waits for the device to learn whether it is enough."""


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        weights_MC: fp32 weight of each chosen expert in the output of a token.
        chosen_MC: int64 numbers of the chosen experts.
        counts_E: int64 number of tokens of each expert.
        loss: what is added to what the model minimises, fp32 scalar; 0 where nothing is.
    """

    weights_MC: torch.Tensor
    chosen_MC: torch.Tensor
    counts_E: torch.Tensor
    loss: torch.Tensor


class Router(nn.Module):
    """Chooses experts by a linear map of the token.

    `topk`: the most probable ones, weighted by their probabilities (Fedus et al. 2022, "Switch Transformers", equation
    2), or as in Mixtral (Jiang et al. 2024, section 2.1) by these scaled to a sum of 1: the softmax of chosen logits.
    `sinkhorn` (Clark et al. 2022, S-BASE): in training the one that a plan with as many tokens for each expert gives
    most of the token; afterwards, where a plan would look into the future, the one with the largest logit. Its weight
    is the sigmoid of the logit, as GPT-NeoX has it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.Linear(config.hidden_size, config.moe_num_experts, bias=False)

    def forward(self, x_MD: torch.Tensor) -> Routing:
        """Route [M, D]; all arithmetic after the linear map is in fp32."""
        config = self.config
        if self.training and config.moe_jitter_eps:
            x_MD = x_MD * torch.empty_like(x_MD).uniform_(1.0 - config.moe_jitter_eps, 1.0 + config.moe_jitter_eps)
        logits_ME = self.layer(x_MD).float()
        if config.moe_router_type == "sinkhorn":
            plan_ME = balanced(logits_ME.detach()) if self.training else logits_ME
            chosen_MC = plan_ME.argmax(dim=-1, keepdim=True)
            return self._routing(logits_ME, logits_ME.gather(1, chosen_MC).sigmoid(), chosen_MC)
        weights_MC, chosen_MC = logits_ME.softmax(dim=-1).topk(config.moe_top_k, dim=-1)
        if config.moe_normalize_weights:
            weights_MC = weights_MC / weights_MC.sum(dim=-1, keepdim=True)
        return self._routing(logits_ME, weights_MC, chosen_MC)

    def _routing(self, logits_ME: torch.Tensor, weights_MC: torch.Tensor, chosen_MC: torch.Tensor) -> Routing:
        """With the losses that are asked for, this block's share in their mean over blocks."""
        config, loss = self.config, logits_ME.new_zeros(())
        counts_E = torch.bincount(chosen_MC.flatten(), minlength=config.moe_num_experts)
        if config.moe_aux_loss_coeff:
            loss = loss + config.moe_aux_loss_coeff * load_balancing_loss(logits_ME, counts_E)
        if config.moe_z_loss_coeff:
            loss = loss + config.moe_z_loss_coeff * logits_ME.logsumexp(dim=-1).square().mean()  # Zoph et al. 2022, 5
        return Routing(weights_MC, chosen_MC, counts_E, loss / len(config.expert_layers))


def load_balancing_loss(logits_ME: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """E sum_e f_e P_e of fp32 logits, with P_e the mean probability of expert e and f_e its tokens over all tokens.

    Fedus et al. 2022, equation 4, for any number C of choices: C where all experts get as many.
    """
    tokens, experts = logits_ME.shape
    return experts * (counts_E / tokens * logits_ME.softmax(dim=-1).mean(dim=0)).sum()


def balanced(logits_ME: torch.Tensor) -> torch.Tensor:
    """Logits shifted by expert so that exponentials, scaled to rows of one sum, have columns of one sum too.

    Sinkhorn & Knopp 1967, in logarithms, which no logit is too large for.
    """
    shift_E = torch.zeros_like(logits_ME[0])
    for _ in range(SINKHORN_STEPS):
        rows_M1 = (logits_ME + shift_E).logsumexp(dim=1, keepdim=True)
        shift_E = -(logits_ME - rows_M1).logsumexp(dim=0)
    return logits_ME + shift_E


class Experts(nn.Module):
    """In place of the MLP of a block: sum over the chosen experts of weight x expert(x).

    Under tensor parallelism each expert is divided like an MLP. The router is whole on every rank and reads whole
    sequences, so that all ranks send a token to the same experts; what they make of it is summed once, at the end.

    Attributes:
        enter, leave: the whole sequence from what a rank has of it, and back, the parts of all ranks added up.
        tensor_ranks: how many ranks run this together; each gives its share of the gradient of the router's own loss,
            as the gradients of all are summed.
        loss_scale: what the engine multiplies a loss by before its backward pass. The router's own loss is not part of
            the one that goes there.
        load_E: tokens of each expert in the last forward pass of training; None before it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = nn.ModuleList(MLP(config, bias=False) for _ in range(config.moe_num_experts))
        self.enter: nn.Module = nn.Identity()
        self.leave: nn.Module = nn.Identity()
        self.tensor_ranks = 1
        self.loss_scale = 1.0
        self.load_E: torch.Tensor | None = None

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Transform each token alone: [B, S, D] -> [B, S, D]."""
        x_BSD = self.enter(x_BSD)
        x_MD = x_BSD.reshape(-1, x_BSD.shape[-1])
        routing: Routing = self.router(x_MD)
        y_MD = self._of_all(x_MD, routing)
        if self.training:
            self.load_E = routing.counts_E
        if self.training and routing.loss.requires_grad:
            y_MD = _WithLoss.apply(y_MD, routing.loss, self.loss_scale / self.tensor_ranks)
        return self.leave(y_MD.view(x_BSD.shape))

    def _of_all(self, x_MD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Sort what goes to each expert together, and back: permutations, so that no order of additions is chance.

        An expert that nobody wants runs on no rows, for its gradients to be zeros and not missing.
        """
        order = routing.chosen_MC.flatten().argsort(stable=True)
        copies_MCD = x_MD[:, None].expand(*routing.chosen_MC.shape, x_MD.shape[-1])
        rows = copies_MCD.flatten(0, 1).index_select(0, order).split(routing.counts_E.tolist())
        outputs = torch.cat([expert(mine) for expert, mine in zip(self.experts, rows, strict=True)])
        outputs_MCD = outputs.index_select(0, order.argsort()).view_as(copies_MCD)
        return (outputs_MCD * routing.weights_MC[..., None].to(x_MD.dtype)).sum(dim=1)


class _WithLoss(torch.autograd.Function):
    """Passes x on, and when its gradient comes gives `loss` one: so the loss needs no way through other layers."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.loss, ctx.scale = (loss.dtype, loss.device), scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        dtype, device = ctx.loss
        return gradient, torch.full((), ctx.scale, dtype=dtype, device=device), None
