"""What a family of models is called in `transformers`: its tensors and its config.json, from one table each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox.checkpoint.huggingface.fields import Always, Field, Plain
from neox.checkpoint.huggingface.layouts import Layout, Same
from neox.checkpoint.weights import fields_of
from neox.config import ModelConfig
from neox.errors import CheckpointError

DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bfloat16": "bfloat16"}
_SAME = Same()


@dataclass(frozen=True)
class Module:
    """Where the parameters of one of our modules are.

    Attributes:
        names: their modules, with `{layer}` for the number of the block.
        layout: how the rows are ordered there.
    """

    names: tuple[str, ...]
    layout: Layout = _SAME

    @classmethod
    def at(cls, *names: str, layout: Layout = _SAME) -> "Module":
        """A module of these names."""
        return cls(names, layout)


def shared(
    *,
    hidden: str = "hidden_size",
    layers: str = "num_hidden_layers",
    heads: str = "num_attention_heads",
    experts: bool = False,
) -> tuple[Field, ...]:
    """Rows of every family, under its names of the three sizes; the others' are read too. Few have experts."""
    return (
        Plain("vocab_size", "padded_vocab_size"),
        Plain(hidden, "hidden_size", also=("hidden_size", "n_embed")),
        Plain(layers, "num_layers", also=("num_hidden_layers", "n_layer")),
        Plain(heads, "num_attention_heads", also=("num_attention_heads", "n_head")),
        Always("use_qk_layernorm", False),
        *(() if experts else (Always("moe_num_experts", 1),)),
    )


@dataclass(frozen=True)
class Family:
    """A class of transformers and the models it can express.

    Attributes:
        name: what `--architecture` calls it.
        model_type: its name in config.json.
        architecture: its class.
        prefix: before the names of all tensors but the head; base models are saved without.
        modules: the table of tensors for a model, by the name of our module within its layer.
        fields: the table of settings.
    """

    name: str
    model_type: str
    architecture: str
    prefix: str
    modules: Callable[[ModelConfig], Mapping[str, Module]]
    fields: tuple[Field, ...]

    def locate(self, name: str, config: ModelConfig) -> tuple[tuple[str, ...], Layout]:
        """Names in their files of a parameter given by its canonical name, and how it is laid out in them."""
        _, index, local = name.split(".", 2)
        module, _, kind = local.rpartition(".")
        layer = int(index) - 2
        place = self.modules(config)[module]
        in_block = any("{layer}" in theirs for theirs in place.names)
        assert in_block == (0 <= layer < config.num_layers), f"{name} is no parameter of this decoder"
        theirs = "weight" if kind == "scale" else kind
        return tuple(f"{each.format(layer=layer)}.{theirs}" for each in place.names), place.layout

    def obstacles(self, config: ModelConfig) -> list[str]:
        """What this class of transformers cannot express in the model; the key, its value, and what it has."""
        found = [field.obstacle(config) for field in self.fields]
        title = self.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        return [text.replace("; it ", f"; {title} ") for text in found if text]

    def config_json(self, config: ModelConfig, *, dtype: str, tokens: Mapping[str, int | None]) -> dict[str, Any]:
        """Return the content of config.json.

        Args:
            config: the model; `padded_vocab_size` must be resolved.
            dtype: type of the weights, `float16` say.
            tokens: `bos_token_id`, `eos_token_id` and, where there is one, `pad_token_id`.
        """
        assert config.padded_vocab_size is not None, "the vocabulary is resolved before a model is exported"
        content: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for field in self.fields:
            content |= field.write(config)
        return {**content, "dtype": dtype, "torch_dtype": dtype, "use_cache": True, **tokens}

    def flat_keys(self, content: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Our configuration keys for the model that a config.json describes.

        Raises:
            CheckpointError: it uses what cannot be computed here; `path` is named.
        """
        with fields_of(path, "its release"):
            for field in self.fields:
                if objection := field.objection(content):
                    raise CheckpointError(f"{path}: {objection}")
            keys: dict[str, Any] = {}
            for field in self.fields:
                keys |= field.read(content)
            found = {key: value for key, value in keys.items() if value is not None}
            return found | {"precision": _precision(content)}


def _precision(content: Mapping[str, Any]) -> str:
    name = content.get("dtype", content.get("torch_dtype")) or "float32"
    return {full: short for short, full in DTYPE_NAMES.items()}.get(name, "fp32")
