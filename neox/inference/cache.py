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
            # The first tokens tell what a rank cannot know from the configuration: its share of the heads.
            batch, _, heads, head_dim = k_BSNH.shape
            self._keys = k_BSNH.new_empty(batch, self.capacity, heads, head_dim)
            self._values = v_BSNH.new_empty(batch, self.capacity, heads, head_dim)
        end = self.length + k_BSNH.shape[1]
        assert end <= self.capacity, f"the cache holds {self.capacity} tokens, not {end}"
        self._keys[:, self.length : end] = k_BSNH
        self._values[:, self.length : end] = v_BSNH
        self.length = end
        return self._keys[:, :end], self._values[:, :end]
