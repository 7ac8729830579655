"""The greedy order of a blend (see `neox.data.blending.blend_order`), many stretches of it at a time.

The order is defined step by step, and a run has some 10^8 steps. So it is cut into blocks, and NumPy takes one step of
thousands of blocks at once. Where the counts stand at the start of a block is guessed some steps earlier: from nearly
right counts the rule soon leads to the right ones, as a corpus that is ahead is passed over until it is not. A block
counts only where the block before it ends with exactly the counts that it started from, so a wrong guess costs time and
never alters the order.
"""

import numpy as np

BLOCK = 1024
"""Steps of a block."""

WARM_UP = 128
"""Steps in which a guess may become right."""

FEWEST, MOST = 128, 4096
"""Blocks that are walked through together: more as long as all of them come out right."""

REPAIRS = 6
"""Rounds in which blocks that started from wrong counts are walked through again."""


def right_blocks(
    weights_C: np.ndarray, counts_C: np.ndarray, first: int, blocks: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Walk through `blocks` blocks from step `first` on, where the counts are known; at least one comes out right.

    Returns:
        Of the K blocks that are certain: their corpora [K, BLOCK] of `dtype`, and the counts at their ends [K, C].
    """
    steps_B = first + BLOCK * np.arange(blocks)
    starts_BC = np.empty((blocks, len(weights_C)))
    starts_BC[0] = counts_C
    starts_BC[1:] = _guessed(weights_C, counts_C, steps_B[1:] - WARM_UP)
    _walk(weights_C, starts_BC[1:], steps_B[1:] - WARM_UP, np.empty((blocks - 1, WARM_UP), dtype))
    found_BL, ends_BC = np.empty((blocks, BLOCK), dtype), np.empty_like(starts_BC)
    wrong = np.arange(blocks)
    for _ in range(REPAIRS):
        counts, corpora = starts_BC[wrong], np.empty((len(wrong), BLOCK), dtype)
        _walk(weights_C, counts, steps_B[wrong], corpora)
        ends_BC[wrong], found_BL[wrong] = counts, corpora
        wrong = 1 + np.flatnonzero((starts_BC[1:] != ends_BC[:-1]).any(axis=1))
        if not len(wrong):
            return found_BL, ends_BC
        certain = int(wrong[0])  # before what is changed now: what starts from a right end is right
        starts_BC[wrong] = ends_BC[wrong - 1]
    return found_BL[:certain], ends_BC[:certain]


def _walk(weights_C: np.ndarray, counts_BC: np.ndarray, steps_B: np.ndarray, corpora_BL: np.ndarray) -> None:
    """Take L steps of each block from step `steps_B` on: fill in the corpora, and advance the counts."""
    counts, rows_B = counts_BC.reshape(-1), np.arange(len(counts_BC)) * counts_BC.shape[1]
    lags_BC = np.empty_like(counts_BC)
    for number in range(corpora_BL.shape[1]):
        steps = np.maximum(steps_B + number, 1).astype(np.float64)
        np.multiply(steps[:, None], weights_C, out=lags_BC)
        np.subtract(lags_BC, counts_BC, out=lags_BC)
        chosen_B = lags_BC.argmax(axis=1)  # the first of equals
        counts[rows_B + chosen_B] += 1.0
        corpora_BL[:, number] = chosen_B


def _guessed(weights_C: np.ndarray, counts_C: np.ndarray, steps_B: np.ndarray) -> np.ndarray:
    """Counts that the rule may have come to at later steps, [B, C]: the shares, the largest remainders rounded up.

    None is below `counts_C`, as counts never fall: a corpus of weight 0 that was taken once, where all others were not
    behind, stays at 1.
    """
    shares_BC = steps_B[:, None] * weights_C
    found_BC = np.maximum(np.floor(shares_BC), counts_C)
    missing_B1 = (steps_B - found_BC.sum(axis=1))[:, None]
    found_BC += _rank(found_BC - shares_BC) < missing_B1
    removable_BC = np.where(found_BC > counts_C, shares_BC - found_BC, np.inf)
    return found_BC - (_rank(removable_BC) < -missing_B1)


def _rank(values_BC: np.ndarray) -> np.ndarray:
    """The place of each value among those of its row, the smallest first."""
    return values_BC.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
