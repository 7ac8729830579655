"""Data: tokenizers, tokenized corpora on disk, the order of samples, and the loader.

text --tokenizers, preprocess--> .bin/.idx --packing, blending--> samples --loader--> micro-batches
"""

from neox.data.build import DatasetSplits, Done, build_datasets, requested_samples, train_iters_for_epochs
from neox.data.index_cache import Coordinator
from neox.data.indexed import IndexedDataset
from neox.data.indexed_writer import IndexedDatasetWriter
from neox.data.loader import BatchLoader
from neox.data.tokenizers import Tokenizer, build_tokenizer, padded_vocab_size

__all__ = [
    "BatchLoader",
    "Coordinator",
    "DatasetSplits",
    "Done",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "Tokenizer",
    "build_datasets",
    "build_tokenizer",
    "padded_vocab_size",
    "requested_samples",
    "train_iters_for_epochs",
]
