"""Muon for the matrices of the blocks, AdamW for everything else, right in every layout.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the scale of the update and the way
to run it over ZeRO partitions are of Liu et al. 2025, "Muon is Scalable for LLM Training".
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import AdamW

from neox.config import ModelConfig
from neox.parallel.mesh import Mesh
from neox.parallel.splits import join_shards, of_any_expert, row_groups, take_shard
from neox.training.optimizers.shares import Share, complete, shares

MATRICES = (
    *("attention.query_key_value.weight", "attention.dense.weight", "mlp.linear1.weight", "mlp.linear2.weight"),
    *("mlp.experts.linear1.weight", "mlp.experts.linear2.weight"),
)
"""Parameters of a block that Muon updates, by local name."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_TINY = 1e-7


def is_matrix(name: str) -> bool:
    """Whether Muon updates the parameter of this canonical name."""
    return of_any_expert(name.split(".", 2)[2]) in MATRICES


def orthogonalize(matrix_MN: torch.Tensor, *, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """Replace the singular values by numbers near 1 (0.7 to 1.2) with a quintic Newton-Schulz iteration.

    Args:
        matrix_MN: any matrix.
        steps: iterations; 5 in the paper.
        dtype: type to compute in; the paper takes bf16.

    Returns:
        U S' V^T for the singular value decomposition U S V^T, [M, N] in `dtype`.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    x = (matrix_MN.T if is_tall else matrix_MN).to(dtype)
    x = x / x.norm().clamp(min=_TINY)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def update_scale(rows: int, columns: int, adjust_lr_fn: str) -> float:
    """What an orthogonalised update is multiplied by, besides the learning rate.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        adjust_lr_fn: as torch.optim.Muon names them: "match_rms_adamw" gives updates the root mean square of AdamW's,
            0.2 sqrt(max(rows, columns)) (Liu et al. 2025, eq. 4), so one learning rate does for all parameters;
            "original" is sqrt(max(1, rows / columns)) (Jordan et al. 2024).
    """
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def logical_matrices(name: str, whole: torch.Tensor, model: ModelConfig) -> Iterator[torch.Tensor]:
    """Views of the matrices that a fused one consists of: q, k and v; up and gate; or itself.

    Each is a map of its own, and orthogonalising them together would let the largest decide for all.

    Args:
        name: canonical name.
        whole: logical tensor [rows, columns].
        model: its heads and activation.

    Yields:
        Views of `whole` whose last dimension is the columns and whose other dimensions are the rows of one matrix.
    """
    groups = row_groups(name, model)
    if name.endswith("query_key_value.weight") and not model.is_grouped:
        yield from whole.view(model.num_attention_heads, 3, -1, whole.shape[1]).unbind(dim=1)
    else:
        unit = whole.shape[0] // sum(groups)
        yield from whole.split([size * unit for size in groups])


class Muon(AdamW):
    """Groups that are marked `orthogonal` take Muon's step, the others AdamW's.

    The momentum is kept in the shares that ZeRO gives this rank. For a step, data ranks that hold parts of one matrix
    exchange them, tensor ranks gather their shards, and every owner orthogonalises whole matrices only: what is
    computed does not depend on the layout.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        mesh: Mesh,
        model: ModelConfig,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        adjust_lr_fn: str,
        adamw_lr: float | None,
        betas: Sequence[float],
        eps: float,
    ) -> None:
        """Take the groups of `neox.training.optimizers.build.parameter_groups`.

        Args:
            groups: with `orthogonal`, and `shards` where that is true.
            lr: learning rate; with it, that of AdamW's groups moves in proportion.
            mesh: the process grid.
            model: for the heads and the activation that fused matrices are divided by; its precision decides whether
                the iteration runs in fp32 or in bf16.
            momentum: decay of the sum of gradients that is orthogonalised.
            nesterov: whether the newest gradient counts once more.
            ns_steps: Newton-Schulz iterations.
            adjust_lr_fn: see update_scale.
            adamw_lr: learning rate of AdamW's groups; None for `lr`.
            betas: of AdamW.
            eps: of AdamW.
        """
        super().__init__(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
        self._mesh, self._model = mesh, model
        self._momentum, self._nesterov = momentum, nesterov
        self._steps, self._adjust = ns_steps, adjust_lr_fn
        self._adamw_share = 1.0 if adamw_lr is None or not lr else adamw_lr / lr
        self._dtype = torch.float32 if model.precision == "fp32" else torch.bfloat16

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter once."""
        assert closure is None, "the gradients are there already"
        groups = self.param_groups
        rates = [group["lr"] for group in groups]
        try:
            self.param_groups = [group for group in groups if not group["orthogonal"]]
            for group in self.param_groups:
                group["lr"] *= self._adamw_share
            super().step()
        finally:
            self.param_groups = groups
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        for group in groups:
            if group["orthogonal"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        held = list(shares(group, self._mesh.data_rank))
        directions = {id(tensor): self._direction(tensor) for tensor in group["params"]}
        parts = [(share, share.of(directions[id(share.tensor)])) for share in held]
        rate = group["lr"]
        for share, whole in zip(held, complete(parts, self._mesh), strict=True):
            update = self._update(share, whole)
            weights = share.of(share.tensor)
            weights.mul_(1.0 - rate * group["weight_decay"]).add_(update[share.start : share.stop], alpha=-rate)

    def _direction(self, tensor: torch.Tensor) -> torch.Tensor:
        """Advance the momentum of one of the optimizer's tensors; return what is to be orthogonalised."""
        gradient, state = tensor.grad, self.state[tensor]
        assert gradient is not None, "every parameter of a group has a gradient"
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(tensor)
        buffer = state["momentum_buffer"].mul_(self._momentum).add_(gradient)
        return gradient.add(buffer, alpha=self._momentum) if self._nesterov else buffer

    def _update(self, share: Share, direction: torch.Tensor) -> torch.Tensor:
        """The orthogonalised and scaled update of this tensor rank's shard, flat, in the type of `direction`."""
        shard, mesh = share.shard, self._mesh
        row_parts = row_groups(shard.name, self._model)
        if shard.is_divided:
            shards = [torch.empty_like(direction) for _ in range(mesh.tensor_size)]
            dist.all_gather(shards, direction.contiguous(), group=mesh.tensor_group)
            direction = join_shards(shard.name, shards, shape=shard.whole, groups=row_parts)
        whole = torch.empty(shard.whole, dtype=direction.dtype, device=direction.device)
        sources = logical_matrices(shard.name, direction, self._model)
        for source, target in zip(sources, logical_matrices(shard.name, whole, self._model), strict=True):
            matrix = source.reshape(-1, source.shape[-1])
            result = orthogonalize(matrix, steps=self._steps, dtype=self._dtype)
            target.copy_((result * update_scale(matrix.shape[0], matrix.shape[1], self._adjust)).view(target.shape))
        own = take_shard(shard.name, whole, rank=mesh.tensor_rank, size=mesh.tensor_size, groups=row_parts)
        return own.reshape(-1)
