"""Keys and values of the tokens a model has already read."""

import torch


class KeyValueCache:
    """Keys and values of one layer, in memory taken once.

    Args:
        capacity: tokens of the longest sequence that will be held.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def append(self, k_BSNH: torch.Tensor, v_BSNH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values; return all of them, [B, K, N, H] each (views of the cache)."""
        if self._keys is None or self._values is None:
            # The first tokens tell what a rank cannot know from the configuration: its share of the heads. Keys may
            # have more than values, where they are normalised by the parameters of each query head.
            self._keys, self._values = (self._room(x) for x in (k_BSNH, v_BSNH))
        end = self.length + k_BSNH.shape[1]
        assert end <= self.capacity, f"the cache holds {self.capacity} tokens, not {end}"
        self._keys[:, self.length : end] = k_BSNH
        self._values[:, self.length : end] = v_BSNH
        self.length = end
        return self._keys[:, :end], self._values[:, :end]

    def _room(self, x_BSNH: torch.Tensor) -> torch.Tensor:
        return x_BSNH.new_empty(x_BSNH.shape[0], self.capacity, *x_BSNH.shape[2:])
