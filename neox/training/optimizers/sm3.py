"""SM3: Adagrad with one accumulator a row and one a column, right in every layout."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from neox.parallel.mesh import Mesh
from neox.parallel.splits import split_dimension
from neox.training.optimizers.shares import Shard, Share, shares

Accumulators = tuple[torch.Tensor, ...]


class SM3(Optimizer):
    """Square-root of minima of sums of maxima of squared gradients (Anil et al. 2019, "Memory-efficient adaptive
    optimization", algorithm SM3-II; `beta` and `momentum` as GPT-NeoX has them). No weight decay.

    An element's second moment is the smallest of its accumulators, plus its squared gradient; an accumulator is the
    largest second moment of its row or column. The accumulators are small: every data rank has them all, and a maximum
    over data and tensor ranks makes them those of the whole tensor whatever the layout.

    Attributes:
        accumulators: by canonical name, one vector a dimension of this tensor rank's shard, fp32.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, mesh: Mesh, momentum: float, beta: float, eps: float
    ) -> None:
        """Take groups with `shards`.

        Args:
            groups: of `neox.training.optimizers.build.parameter_groups`.
            lr: learning rate.
            mesh: the process grid.
            momentum: share of the old update that is kept; 0 keeps no buffer.
            beta: decay of the second moments; 0 sums them as Adagrad does.
            eps: added to the second moment before the root.
        """
        super().__init__(groups, {"lr": lr, "momentum": momentum, "beta": beta, "eps": eps})
        self._mesh = mesh
        self.accumulators: dict[str, Accumulators] = {
            shard.name: tuple(torch.zeros(size, device=mesh.device) for size in shard.shape)
            for group in groups
            for shard in group["shards"]
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter once."""
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            # The step's maxima, over what this rank holds of each parameter.
            maxima = {s.name: tuple(map(torch.zeros_like, self.accumulators[s.name])) for s in group["shards"]}
            for share in shares(group, self._mesh.data_rank):
                self._update(share, group, maxima[share.shard.name])
            self._agree(group["shards"], maxima)
            for name, new in maxima.items():
                for accumulator, largest in zip(self.accumulators[name], new, strict=True):
                    # With beta the second moments decay, and upstream keeps the largest ever.
                    accumulator.copy_(torch.maximum(accumulator, largest) if group["beta"] > 0.0 else largest)

    def _update(self, share: Share, group: dict[str, Any], maxima: Accumulators) -> None:
        assert share.tensor.grad is not None, "every parameter of a group has a gradient"
        gradient, beta, momentum = share.of(share.tensor.grad), group["beta"], group["momentum"]
        shape = share.shard.shape
        places = torch.arange(share.start, share.stop, device=gradient.device)
        indices = torch.unravel_index(places, shape)
        covers = [a[index] for a, index in zip(self.accumulators[share.shard.name], indices, strict=True)]
        moment = torch.stack(covers).amin(dim=0)
        if beta > 0.0:
            moment.mul_(beta)
        moment.addcmul_(gradient, gradient, value=1.0 - beta)
        for largest, index in zip(maxima, indices, strict=True):
            largest.scatter_reduce_(0, index, moment, reduce="amax")
        update = (moment + group["eps"]).rsqrt_().mul_(gradient)
        if momentum > 0.0:
            state = self.state[share.tensor]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(share.tensor)
            update = share.of(state["momentum_buffer"]).lerp_(update, 1.0 - momentum)
        share.of(share.tensor).sub_(update, alpha=group["lr"])

    def _agree(self, shards: list[Shard], maxima: dict[str, Accumulators]) -> None:
        """Take the maximum over the ranks that hold other parts of the same row or column."""
        mesh = self._mesh
        if mesh.data_size > 1:
            _maximum_over([largest for vectors in maxima.values() for largest in vectors], mesh.data_group)
        across = [
            largest
            for shard in shards
            if shard.is_divided
            for dimension, largest in enumerate(maxima[shard.name])
            if dimension != split_dimension(shard.name)
        ]
        if across:
            _maximum_over(across, mesh.tensor_group)


def _maximum_over(vectors: list[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    joined = torch.cat(vectors)
    dist.all_reduce(joined, op=dist.ReduceOp.MAX, group=group)
    for vector, result in zip(vectors, joined.split([v.numel() for v in vectors]), strict=True):
        vector.copy_(result)
