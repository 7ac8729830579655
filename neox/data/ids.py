"""Token ids that a model has a row for.

A larger id need not fail by itself: divided over ranks, the embedding and the loss take an id that no rank holds for
zeros, and the run looks healthy.
"""

from dataclasses import dataclass

import numpy as np

from neox.errors import DataError


@dataclass(frozen=True)
class AllowedIds:
    """The ids from 0 to before `rows`; of labels also the negative ones, which stand for no label.

    Attributes:
        rows: of the vocabulary, without those that pad it to a tensor-parallel size.
        are_labels: whether the ids are labels.
    """

    rows: int
    are_labels: bool = False

    def check_type(self, dtype: np.dtype, prefix: str) -> None:
        """Check the type of all ids of a corpus.

        Raises:
            DataError: they are no whole numbers.
        """
        if dtype.kind not in "iu":
            raise DataError(f"{prefix}: holds numbers of type {dtype.name}, but token ids are integers")

    def check(self, ids: np.ndarray, prefix: str) -> None:
        """Check ids that were read from a corpus.

        Raises:
            DataError: one of them is not allowed.
        """
        if not len(ids):
            return
        if (largest := int(ids.max())) >= self.rows:
            raise DataError(
                f"{prefix}: has token id {largest}, but the vocabulary of the model has {self.rows} rows; "
                "train on data made with the tokenizer of this model, or set padded_vocab_size"
            )
        if not self.are_labels and ids.dtype.kind == "i" and (smallest := int(ids.min())) < 0:
            raise DataError(f"{prefix}: has token id {smallest}, but only labels may be negative; make the data again")
