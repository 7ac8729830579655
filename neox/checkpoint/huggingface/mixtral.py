"""Mixtral: Mistral with experts in every block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neox.checkpoint.huggingface.family import Family, Module, shared
from neox.checkpoint.huggingface.fields import Always, Field, Plain, Positions, Window
from neox.checkpoint.huggingface.layouts import Stacked
from neox.checkpoint.huggingface.llama import ALL, dense_modules
from neox.checkpoint.huggingface.rope import Rotary
from neox.config import ModelConfig


def _modules(config: ModelConfig) -> Mapping[str, Module]:
    block = "model.layers.{layer}.block_sparse_moe."
    found = {**dense_modules(config), "mlp.router.layer": Module.at(block + "gate")}
    for number in range(config.moe_num_experts):
        ours, theirs = f"mlp.experts.{number}.", f"{block}experts.{number}."
        found[ours + "linear1"] = Module.at(theirs + "w3", theirs + "w1", layout=Stacked())
        found[ours + "linear2"] = Module.at(theirs + "w2")
    return found


@dataclass(frozen=True)
class _Jitter(Field):
    """Noise on the router; 0 there is none here."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {"router_jitter_noise": config.moe_jitter_eps or 0.0}

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """See Field."""
        return {"moe_jitter_eps": content.get("router_jitter_noise") or None}


@dataclass(frozen=True)
class _SomeExperts(Field):
    """More than one expert."""

    def obstacle(self, config: ModelConfig) -> str:
        """See Field."""
        return "" if config.has_experts else "moe_num_experts: 1; it has more than 1"


MIXTRAL = Family(
    name="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    prefix="model.",
    modules=_modules,
    fields=(
        *shared(experts=True),
        *ALL,
        Rotary(default_base=1e6),
        Plain("rms_norm_eps", "rms_norm_epsilon", 1e-5),
        Positions(default=4096 * 32),
        Plain("num_key_value_heads", "num_kv_heads", 8),
        Window(default=None),
        Always("use_bias_in_attn_linear", False),
        Always("use_bias_in_mlp", False),
        _SomeExperts(),
        Plain("num_local_experts", "moe_num_experts", 8),
        Plain("num_experts_per_tok", "moe_top_k", 2),
        Plain("router_aux_loss_coef", "moe_aux_loss_coeff", 0.001),
        _Jitter(),
        Always("moe_router_type", "topk"),
        Always("moe_normalize_weights", True),
        Always("moe_expert_interval", 1),
    ),
)
