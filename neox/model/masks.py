"""Which keys a query sees, and what their distance costs: all kinds of masks in one place.

A mask is what is added to the scores: 0 where a key is seen, minus infinity where it is not, and under ALiBi the price
of the distance. Scores of unseen keys become probabilities of exactly 0. Distances are counted in columns of the row,
which stand for positions because the tokens of a document, or of a padded prompt, lie side by side.
"""

from functools import lru_cache

import torch


def attention_mask(
    *,
    queries: int,
    keys: int,
    window: int | None,
    slopes: tuple[float, ...],
    mask_BSK: torch.Tensor | None,
    documents_BS: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor | None:
    """Build the mask of queries that are the last `queries` of `keys` columns.

    Args:
        queries: number of queries, S.
        keys: number of keys, K.
        window: keys that a query sees before its own, which is what upstream counts (`transformers` counts its own
            too, so its window is one more); None for all.
        slopes: ALiBi's, one for each head; empty without ALiBi.
        mask_BSK: True where a query may see a key, which then says what is causal too; None for causal.
        documents_BS: number of each token's document within its row; a query sees keys of its own document only.
        dtype: of the queries.
        device: of the queries.

    Returns:
        [B or 1, N or 1, S, K] of `dtype`; None where each query sees all keys up to its own column, at no price.
    """
    if window is not None and window >= keys - 1:
        window = None
    shape = (queries, keys)
    if mask_BSK is None and documents_BS is None:
        if window is None and not slopes and queries == keys:
            return None
        if torch.compiler.is_compiling():
            return _by_column(shape, window, slopes, dtype, device)
        # The same for every layer of a model, so the layers share it; tensors of inference mode cannot be trained with.
        return _shared(torch.is_inference_mode_enabled(), shape, window, slopes, dtype=dtype, device=device)
    mask = _by_column(shape, window, slopes, dtype, device, causal=mask_BSK is None)
    if mask_BSK is not None:
        mask = mask.masked_fill(~mask_BSK[:, None], -torch.inf)
    if documents_BS is not None:
        assert documents_BS.shape[1] == keys, "documents are known of all keys"
        own_BSK = documents_BS[:, -queries:, None] == documents_BS[:, None]
        mask = mask.masked_fill(~own_BSK[:, None], -torch.inf)
    return mask


def _by_column(
    shape: tuple[int, int],
    window: int | None,
    slopes: tuple[float, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    causal: bool = True,
) -> torch.Tensor:
    """The part that depends on columns alone, [1, N or 1, S, K]."""
    queries, keys = shape
    columns_K = torch.arange(keys, device=device)
    distance_SK = columns_K[keys - queries :, None] - columns_K
    unseen_SK = distance_SK < 0 if causal else torch.zeros_like(distance_SK, dtype=torch.bool)
    if window is not None:
        unseen_SK = unseen_SK | (distance_SK > window)
    price_NSK = torch.zeros(1, queries, keys, dtype=dtype, device=device)
    if slopes:
        slopes_N = torch.tensor(slopes, dtype=torch.float32, device=device)
        price_NSK = (-slopes_N[:, None, None] * distance_SK).to(dtype)
    return price_NSK.masked_fill(unseen_SK, -torch.inf)[None]


@lru_cache(maxsize=1)
def _shared(
    inference: bool,
    shape: tuple[int, int],
    window: int | None,
    slopes: tuple[float, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    assert inference == torch.is_inference_mode_enabled(), "the mode is part of the key"
    return _by_column(shape, window, slopes, dtype, device)
