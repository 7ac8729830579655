"""Rules of the model: sizes that must fit each other, and values that follow from others."""

from neox.config.deepspeed import DeepSpeedConfig
from neox.config.model import ModelConfig
from neox.config.problems import Problems
from neox.config.resolve_attention import resolve_attention
from neox.config.resolve_experts import resolve_experts

_VENDOR_NORMS = {"te_layernorm": "layernorm", "te_rmsnorm": "rmsnorm"}
_EPSILONS = {
    "layernorm_epsilon": ("layernorm", "non_parametric_layernorm"),
    "rms_norm_epsilon": ("rmsnorm",),
    "scalenorm_epsilon": ("scalenorm",),
}


def resolve_model(
    model: ModelConfig, deepspeed: DeepSpeedConfig, problems: Problems, notices: list[str]
) -> ModelConfig:
    """Fill in what is not given, and note what does not fit and what has no effect."""
    model = model.model_copy(
        update={
            "intermediate_size": _mlp_width(model, problems),
            "norm": _norm(model, notices),
            "num_kv_heads": model.num_kv_heads or model.num_attention_heads,
            "max_position_embeddings": model.max_position_embeddings or model.seq_length + model.opt_pos_emb_offset,
            "precision": _precision(model, deepspeed, problems),
        }
    )
    _check_positions(model, problems, notices)
    _check_block(model, problems, notices)
    return resolve_attention(resolve_experts(model, problems, notices), problems)


def _mlp_width(model: ModelConfig, problems: Problems) -> int:
    if model.intermediate_size and model.expansion_factor:
        problems.add("expansion_factor", "set together with intermediate_size; keep one of them")
    width = model.intermediate_size or int((model.expansion_factor or 4) * model.hidden_size)
    model = model.model_copy(update={"intermediate_size": width})
    if not model.mlp_inner_width:
        key = "expansion_factor" if model.expansion_factor else "intermediate_size"
        problems.add(
            key, f"{getattr(model, key):g} leaves the MLP no column with activation {model.activation}; raise it"
        )
    return width if model.is_gated else model.mlp_inner_width


def _norm(model: ModelConfig, notices: list[str]) -> str:
    """The norm by its plain name; epsilons that were set for another one are announced."""
    norm = _VENDOR_NORMS.get(model.norm, model.norm)
    if norm != model.norm:
        notices.append(f"norm: {model.norm} runs as {norm}, which computes the same without TransformerEngine")
    for key, norms in _EPSILONS.items():
        if norm not in norms and getattr(model, key) != ModelConfig.model_fields[key].default:
            notices.append(f"{key} has no effect: norm is {norm}")
    return norm


def _check_positions(model: ModelConfig, problems: Problems, notices: list[str]) -> None:
    for key in ("rotary_pct", "rotary_emb_base"):
        if model.pos_emb != "rotary" and getattr(model, key) != ModelConfig.model_fields[key].default:
            notices.append(f"{key} has no effect: pos_emb is {model.pos_emb}")
    offset, rows = model.opt_pos_emb_offset, model.max_position_embeddings
    if model.pos_emb == "sinusoidal" and model.hidden_size % 2:
        problems.add(
            "hidden_size",
            f"{model.hidden_size} is odd, and pos_emb sinusoidal needs pairs; set {model.hidden_size + 1}",
        )
    if offset and model.pos_emb != "learned":
        problems.add(
            "opt_pos_emb_offset",
            f"{offset} shifts learned positions, and pos_emb is {model.pos_emb!r}; remove it or set pos_emb: learned",
        )
    elif model.seq_length + offset > rows:
        shift = f" with opt_pos_emb_offset {offset}" if offset else ""
        problems.add(
            "seq_length",
            f"{model.seq_length}{shift} is longer than max_position_embeddings {rows}; "
            f"set max_position_embeddings: {model.seq_length + offset}",
        )


def _check_block(model: ModelConfig, problems: Problems, notices: list[str]) -> None:
    if model.gpt_j_tied and not model.gpt_j_residual:
        problems.add(
            "gpt_j_tied",
            "true shares the norm of two parallel branches, and gpt_j_residual is false; set gpt_j_residual: true "
            "or remove gpt_j_tied",
        )
    if model.bias_gelu_fusion and model.activation != "gelu":
        notices.append(f"bias_gelu_fusion has no effect: activation is {model.activation}, not gelu")


def _precision(model: ModelConfig, deepspeed: DeepSpeedConfig, problems: Problems) -> str:
    enabled = [
        (key, name)
        for key, name in (("fp16", "fp16"), ("bf16", "bfloat16"))
        if (getattr(deepspeed, key) or {}).get("enabled")
    ]
    if len(enabled) == 2:
        problems.add("bf16.enabled", "fp16 is enabled too; enable one of them")
    if "precision" not in model.model_fields_set:
        return enabled[0][1] if enabled else "fp32"
    for key, name in enabled:
        if name != model.precision:
            problems.add(f"{key}.enabled", f"contradicts precision {model.precision!r}; set precision: {name}")
    return model.precision
