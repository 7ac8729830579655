"""Bits per byte: how many bits the model needs for a byte of text it has not seen, whatever its tokenizer."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from neox.model.layers import Decoder
from neox.model.loss import token_losses

BATCH_WINDOWS = 16


@dataclass(frozen=True)
class HeldOutLoss:
    """What a model says of held-out text.

    Attributes:
        nats: summed over all tokens, the end of each document included.
        tokens: how many those are.
        text_bytes: UTF-8 bytes of the text behind them.
    """

    nats: float
    tokens: int
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """All the nats over all the bytes; the end-of-document tokens cost bits and add no bytes."""
        return self.nats / math.log(2.0) / self.text_bytes


@dataclass(frozen=True)
class Window:
    """A stretch of a document that goes through the model at once.

    Attributes:
        rows: its tokens, int64 [inputs + 1]; each is the label of the one before.
        new: how many of its labels, the last ones, no earlier window has counted.
    """

    rows: np.ndarray
    new: int


def held_out_loss(
    model: Decoder, documents: Iterable[np.ndarray], *, eod: int, text_bytes: int, stride: int
) -> HeldOutLoss:
    """Loss of every token of every document, each counted once.

    Each document is read alone, after an end-of-document token, as in training. Windows of `seq_length` tokens
    advance by `stride` tokens, so that beyond a document's first window each counted token has at least
    `seq_length - stride` tokens of context.

    Args:
        model: in eval mode, on the device that shall compute.
        documents: token numbers of each, ending in `eod`.
        eod: end-of-document token.
        text_bytes: UTF-8 bytes of the documents' text.
        stride: 1 .. seq_length.
    """
    length = model.config.seq_length
    assert 1 <= stride <= length, f"stride {stride} for windows of {length} tokens"
    groups: dict[tuple[int, int], list[Window]] = {}
    for document in documents:
        for window in windows(document, eod=eod, length=length, stride=stride):
            groups.setdefault((len(window.rows), window.new), []).append(window)
    nats, tokens = 0.0, 0
    for group in groups.values():
        for first in range(0, len(group), BATCH_WINDOWS):
            batch = group[first : first + BATCH_WINDOWS]
            nats += _nats(model, batch)
            tokens += sum(window.new for window in batch)
    return HeldOutLoss(nats, tokens, text_bytes)


def windows(document: np.ndarray, *, eod: int, length: int, stride: int) -> Iterator[Window]:
    """Cut a document into windows of `length` inputs; the last one ends with it, a short document is one window."""
    rows = np.concatenate(([eod], document)).astype(np.int64)
    labels, counted = len(document), 0
    for start in range(0, labels, stride):
        end = min(start + length, labels)
        yield Window(rows[max(0, end - length) : end + 1], end - counted)
        counted = end
        if end == labels:
            return


@torch.no_grad()
def _nats(model: Decoder, batch: list[Window]) -> float:
    """Sum of the losses of the new labels of windows that are equally long and equally new."""
    device, new = next(model.parameters()).device, batch[0].new
    rows = torch.from_numpy(np.stack([window.rows for window in batch])).to(device)
    hidden = model.hidden(rows[:, :-1].contiguous())[:, -new:]
    return float(token_losses(model.head(hidden), rows[:, -new:]).double().sum())
