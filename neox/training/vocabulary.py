"""The size of the softmax, where nothing but files says what it is."""

import os

from neox.checkpoint.open import open_checkpoint
from neox.config import Config
from neox.data import build_tokenizer, padded_vocab_size
from neox.training.origin import load_folder
from neox.training.resumption import expected


def settle_vocabulary(config: Config) -> Config:
    """Fix the softmax's size: the configuration's, the checkpoint's, or the tokenizer's padded as upstream does."""
    if config.model.padded_vocab_size is not None:
        return config
    folder = load_folder(expected(config, os.environ))
    if folder is not None:
        return config.with_vocabulary(open_checkpoint(folder).padded_vocab_size)
    tokenizer = build_tokenizer(config.tokenizer)
    return config.with_vocabulary(
        padded_vocab_size(
            tokenizer.vocab_size,
            divisible_by=config.model.make_vocab_size_divisible_by,
            model_parallel_size=config.parallel.model_parallel_size,
        )
    )
