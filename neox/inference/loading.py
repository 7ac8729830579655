"""A model and its tokenizer, ready to generate."""

from pathlib import Path

from neox.checkpoint.huggingface import is_huggingface
from neox.checkpoint.lora import merged
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.upstream.reader import Hints
from neox.checkpoint.weights import WeightReader, check_vocabulary, weight_source
from neox.config import Config
from neox.data.tokenizers import Tokenizer, build_tokenizer
from neox.data.tokenizers.special_tokens import end_ids
from neox.errors import CheckpointError, ConfigError
from neox.model.build import DTYPES, build_decoder
from neox.model.layers import Decoder
from neox.parallel.mesh import Mesh


def open_model(config: Config) -> WeightReader:
    """Open the checkpoint that `load` (and `iteration`) name, of any format, with LoRA's factors merged.

    Raises:
        CheckpointError: `load` is not set, or there is no checkpoint.
    """
    if config.checkpoint.load is None:
        raise CheckpointError("load: not set, so there is no model; add load=FOLDER, the `save` of the training run")
    reader = open_checkpoint(
        Path(config.checkpoint.load),
        config.checkpoint.iteration,
        hints=Hints.of(config.model),
    )
    return merged(reader)


def load_model(config: Config, mesh: Mesh) -> tuple[Decoder, Tokenizer]:
    """Read the checkpoint that `load` (and `iteration`) name.

    The vocabulary is the checkpoint's. The layout that wrote it does not matter; tensor-parallel ranks of `mesh`
    take their shares, copies of the model read it whole.

    Returns:
        The model in eval mode on the device of `mesh`, in the configuration's precision, and its tokenizer, which ends
        texts at the tokens that the folder of a Hugging Face model names too.

    Raises:
        CheckpointError: see `open_model`, or the checkpoint does not fit the configuration or the tokenizer.
        ConfigError: a reward model is asked for text.
        DataError: the tokenizer cannot be built.
    """
    if config.model.has_reward_head:
        raise ConfigError("train_impl: rm gives rewards and no text; name the configuration of a language model")
    tokenizer = build_tokenizer(config.tokenizer)
    reader = open_model(config)
    check_vocabulary(reader, tokenizer.vocab_size)
    if is_huggingface(reader.folder):
        tokenizer.ends = tuple(dict.fromkeys((*tokenizer.ends, *end_ids(reader.folder))))
    return _decoder(config, mesh, reader), tokenizer


def load_weights(config: Config, mesh: Mesh) -> Decoder:
    """The model of `load_model` where no text is read or written, so that it needs no tokenizer.

    Raises:
        CheckpointError: see `open_model`, or the checkpoint does not fit the configuration.
    """
    return _decoder(config, mesh, open_model(config))


def _decoder(config: Config, mesh: Mesh, reader: WeightReader) -> Decoder:
    model_config = config.model.model_copy(update={"padded_vocab_size": reader.padded_vocab_size})
    dtype = DTYPES[config.model.precision]
    return build_decoder(model_config, source=weight_source(reader), mesh=mesh, dtype=dtype).eval()
