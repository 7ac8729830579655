"""Rules of experts: who chooses how many of them, and what has no effect without."""

from typing import Any

from neox.config.model import ModelConfig
from neox.config.problems import Problems

_TOPK_ONLY = ("moe_normalize_weights", "moe_jitter_eps", "moe_aux_loss_coeff")
_MEND = "set moe_router_type: topk"


def resolve_experts(model: ModelConfig, problems: Problems, notices: list[str]) -> ModelConfig:
    """Fill in what follows from the router, and note what does not fit it or has no effect."""
    if not model.has_experts:
        unused = [key for key in _keys(model) if _differs(model, key)]
        notices.extend(f"{key} has no effect: moe_num_experts is {model.moe_num_experts}" for key in unused)
        return model.model_copy(update={key: ModelConfig.model_fields[key].default for key in unused})
    if model.moe_top_k > model.moe_num_experts:
        problems.add("moe_top_k", f"{model.moe_top_k} of {model.moe_num_experts} experts (moe_num_experts); lower it")
    # Experts have no biases, so where there is no other MLP neither has the model.
    update: dict[str, Any] = {"use_bias_in_mlp": model.use_bias_in_mlp and model.moe_expert_interval > 1}
    if model.moe_router_type == "sinkhorn":
        _check_sinkhorn(model, problems)
        update["moe_aux_loss_coeff"] = 0.0
    elif "moe_normalize_weights" not in model.model_fields_set:
        update["moe_normalize_weights"] = model.moe_top_k > 1
    return model.model_copy(update=update)


def _check_sinkhorn(model: ModelConfig, problems: Problems) -> None:
    if model.moe_top_k > 1:
        problems.add("moe_top_k", f"{model.moe_top_k} with moe_router_type sinkhorn, which gives a token one; {_MEND}")
    for key in _TOPK_ONLY:
        if key in model.model_fields_set and getattr(model, key):
            value = str(getattr(model, key)).lower()
            problems.add(key, f"{value} has no meaning with moe_router_type sinkhorn; {_MEND}, or remove the key")


def _keys(model: ModelConfig) -> list[str]:
    return [key for key in type(model).model_fields if key.startswith("moe_") and key != "moe_num_experts"]


def _differs(model: ModelConfig, key: str) -> bool:
    return bool(getattr(model, key) != ModelConfig.model_fields[key].default)
