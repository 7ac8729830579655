"""MADGRAD with decoupled weight decay, as GPT-NeoX's `madgrad_wd` computes it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class MadgradW(Optimizer):
    """Momentumized, adaptive, dual averaged gradient (Defazio & Jelassi 2021, "Adaptivity without compromise").

    With step k from 0, rate r = lr + eps and l = r sqrt(k + 1): s += l g, v += l g^2, z = x0 - s / (v^(1/3) + eps),
    and x moves the share 1 - momentum of the way to z. Before that x, but not x0, is multiplied by
    1 - r weight_decay.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.9, eps: float = 1e-6
    ) -> None:
        """Take parameter groups with `weight_decay`.

        Args:
            params: groups.
            lr: learning rate.
            momentum: share of the old weights that a step keeps.
            eps: added to the root and, as the paper's authors do, to the learning rate.
        """
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter once."""
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        gradient, state, eps = parameter.grad, self.state[parameter], group["eps"]
        assert gradient is not None, "the caller looked"
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["grad_sum"] = torch.zeros_like(parameter)
            state["grad_sum_sq"] = torch.zeros_like(parameter)
            state["start"] = parameter.detach().clone()
        rate = group["lr"] + eps
        step_size = rate * float(state["step"] + 1) ** 0.5
        parameter.mul_(1.0 - rate * group["weight_decay"])
        state["grad_sum"].add_(gradient, alpha=step_size)
        state["grad_sum_sq"].addcmul_(gradient, gradient, value=step_size)
        target = state["start"].addcdiv(state["grad_sum"], state["grad_sum_sq"].pow(1 / 3).add_(eps), value=-1.0)
        parameter.lerp_(target, 1.0 - group["momentum"])
        state["step"] += 1
