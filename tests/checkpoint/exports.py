"""Random models and their exports, for tests."""

import tokenizers
import torch
from model_families import GQA, KEYS, LLAMA, MIXTRAL
from tokenizers import models, pre_tokenizers
from weight_sources import RandomWeights

from neox.checkpoint.huggingface import export_huggingface
from neox.config import TokenizerConfig, config_from_dict

SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 24,
    "padded_vocab_size": 512,
    "train_micro_batch_size_per_gpu": 1,
    "tokenizer_type": "CharLevelTokenizer",
}
ROUND_TRIPS = {"neox": KEYS["neox"], "llama, all heads": LLAMA, "llama, grouped heads": GQA, "mixtral": MIXTRAL}


def random_run(**keys):
    config = config_from_dict(SHAPE | keys)
    return config, RandomWeights(config.model)


def exported(folder, dtype=torch.float32, **keys):
    """An export of random weights, the configuration, the weights."""
    config, weights = random_run(**keys)
    export_huggingface(weights, config.model, folder, dtype=dtype)
    return config, weights


def same_weights(reader, weights):
    assert set(reader.names()) == set(weights.names())
    for name in weights.names():
        assert torch.equal(reader.tensor(name), weights.tensor(name)), name


def llama_tokenizer(path, special=("<unk>", "<s>", "</s>")):
    """A vocabulary of bytes with Llama's special tokens first."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(list(special))
    backend.save(str(path))
    return TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(path))


class CountedWeights(RandomWeights):
    """Counts how often each tensor is read."""

    def __init__(self, config):
        super().__init__(config)
        self.reads = dict.fromkeys(self.names(), 0)

    def tensor(self, name):
        self.reads[name] += 1
        return super().tensor(name)
