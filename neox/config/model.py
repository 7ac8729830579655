"""The model: its shape, its formula and its initial weights."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from neox.config.keys import Float, Int, Lower, Section, as_tuple, dead, derived, no_effect, not_yet, setting

_INITS = Literal["normal", "scaled_normal", "small_init", "wang_init"]
_OTHER_INITS = (
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
    "single_residual_scaled_normal",
)
_OTHER_NORMS = ("rmsnorm", "non_parametric_layernorm", "scalenorm", "te_rmsnorm", "te_layernorm")
_OTHER_ACTIVATIONS = (*("geglu", "relu", "softsign", "swish", "mish", "silu", "reglu", "swiglu", "bilinear", "glu"),)


def precision_name(value: Any) -> Any:
    """Spell a precision upstream's way: bf16 is bfloat16."""
    name = value.lower() if isinstance(value, str) else value
    return "bfloat16" if name == "bf16" else name


class ModelConfig(Section):
    """A decoder of `num_layers` blocks of width `hidden_size`."""

    num_layers: Int = setting(..., "Number of blocks.", gt=0)
    hidden_size: Int = setting(..., "Width of the residual stream.", gt=0)
    num_attention_heads: Int = setting(..., "Attention heads of a block.", gt=0)
    intermediate_size: Int = setting(
        0, "Width of the MLP; absent: expansion_factor x hidden_size, or 4 x hidden_size.", gt=0
    )
    expansion_factor: Float | None = setting(None, "Width of the MLP as a multiple of hidden_size.", gt=0)
    mlp_multiple_of: Int = setting(1, "The width of the MLP is rounded up to a multiple of this.", gt=0)
    seq_length: Int = setting(..., "Tokens of a training sequence.", gt=0)
    max_position_embeddings: Int = setting(0, "Longest sequence, in tokens; absent: seq_length.", gt=0)
    norm: Literal["layernorm"] = setting("layernorm", "Normalisation.", upstream=_OTHER_NORMS)
    layernorm_epsilon: Float = setting(1e-5, "Epsilon of layernorm.", gt=0)
    pos_emb: Annotated[Literal["learned", "rotary", "none"], Lower] = setting(
        "learned", "Position encoding.", upstream=("sinusoidal", "rpe", "alibi")
    )
    rotary_pct: Float = setting(1.0, "Share of each head that is rotated.", gt=0, le=1)
    rotary_emb_base: Float = setting(10000, "Base of the rotary frequencies.", gt=0)
    no_weight_tying: bool = setting(False, "Give the output head a matrix of its own.")
    activation: Literal["gelu"] = setting("gelu", "Nonlinearity of the MLP.", upstream=_OTHER_ACTIVATIONS)
    bias_gelu_fusion: bool = setting(False, "GELU by its tanh approximation instead of the exact erf.")
    gpt_j_residual: bool = setting(False, "Parallel residual: x + attention(ln1(x)) + mlp(ln2(x)).")
    use_bias_in_attn_linear: bool = setting(True, "Biases in the two matrices of attention.")
    use_bias_in_mlp: bool = setting(True, "Biases in the two matrices of the MLP.")
    hidden_dropout: Float = setting(0.0, "Dropout before each residual addition and on embeddings.", ge=0, lt=1)
    attention_dropout: Float = setting(0.0, "Dropout on attention probabilities.", ge=0, lt=1)
    init_method: _INITS = setting("normal", "Initialiser of embeddings and input matrices.", upstream=_OTHER_INITS)
    output_layer_init_method: _INITS = setting(
        "scaled_normal",
        "Initialiser of the matrices that write to the residual stream.",
        upstream=_OTHER_INITS,
    )
    init_method_std: Float = setting(0.02, "Standard deviation of normal and scaled_normal.", gt=0)
    padded_vocab_size: Int | None = setting(None, "Rows of the embedding; absent: from the tokenizer.", gt=0)
    make_vocab_size_divisible_by: Int = setting(
        128, "The vocabulary is padded to a multiple of this times model_parallel_size.", gt=0
    )
    precision: Annotated[Literal["fp32", "fp16", "bfloat16"], BeforeValidator(precision_name)] = setting(
        "fp32", "Type of parameters and arithmetic; absent: from the fp16 and bf16 sections, else fp32."
    )
    compile: bool | None = setting(None, "Compile the blocks with torch.compile; absent: where it pays.")
    attention_config: Annotated[tuple[Any, ...], BeforeValidator(as_tuple)] | None = setting(
        None, "Attention of each layer, e.g. [[[flash], 12]]; global and flash are the same operation here."
    )
    attention_types: tuple[str, ...] = derived((), "attention_config spelled out, one name a layer.")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_ndims(self) -> int:
        """Leading dimensions of a head that are rotated."""
        return int(self.head_dim * self.rotary_pct)


OTHER_KEYS = (
    no_effect("layernorm_fusion", bool, False, "Fused layer normalisation."),
    no_effect("scaled_upper_triang_masked_softmax_fusion", bool, False, "Fused causal softmax."),
    no_effect("scaled_masked_softmax_fusion", bool, False, "Fused masked softmax."),
    no_effect("bias_dropout_fusion", bool, False, "Fused bias, dropout and residual addition."),
    no_effect("rope_fusion", bool, False, "Fused rotary embedding."),
    no_effect("fused_kernels_build_path", str, None, "Folder where CUDA extensions are built; there are none."),
    no_effect("apply_query_key_layer_scaling", bool, False, "Scale scores by depth and back; cancels out."),
    no_effect("attention_softmax_in_fp32", bool, False, "Softmax in fp32, as attention always does here."),
    no_effect("use_cpu_initialization", bool, False, "Draw weights on the CPU, as is always done here."),
    no_effect("rotary_save_freqs_buffer", bool, False, "Store rotary frequencies; they are always recomputed."),
    no_effect("output_layer_parallelism", Literal["column"], "column", "How the head is split."),
    dead("num_unique_layers", int, None, "Layers with weights of their own."),
    dead("param_sharing_style", str, "grouped", "Order of shared layers."),
    dead("use_bias_in_norms", bool, True, "Biases in norms."),
    dead("weight_server_port", int | list, 6000, "Port of the weight server."),
    dead("te_fp8_margin", int, 0, "Margin of the fp8 scale."),
    dead("moe_lbl_in_fp32", bool, False, "Load-balancing loss in fp32."),
    dead("mup_attn_temp", float, 1.0, "muP temperature of attention."),
    dead("mup_output_temp", float, 1.0, "muP temperature of the output."),
    not_yet("num_kv_heads", int, None, "Heads of keys and values.", same_as="num_attention_heads"),
    not_yet("sliding_window_width", int, None, "Width of local attention."),
    not_yet("rmsnorm_fusion", bool, False, "Fused RMS normalisation."),
    not_yet("use_qk_layernorm", bool, False, "Normalise queries and keys."),
    not_yet("rms_norm_epsilon", float, 1e-8, "Epsilon of rmsnorm."),
    not_yet("scalenorm_epsilon", float, 1e-8, "Epsilon of scalenorm."),
    not_yet("rpe_num_buckets", int, 32, "Buckets of relative positions."),
    not_yet("rpe_max_distance", int, 128, "Largest relative position."),
    not_yet("opt_pos_emb_offset", int, 0, "Shift of learned positions."),
    not_yet("sparsity_config", dict, None, "Settings of block-sparse attention."),
    not_yet("sparse_attention", dict, None, "DeepSpeed's settings of sparse attention."),
    not_yet("use_flashattn_swiglu", bool, False, "SwiGLU kernel of flash-attn."),
    not_yet("fp16_lm_cross_entropy", bool, False, "Loss in fp16."),
    not_yet("gmlp_attn_dim", int, 64, "Width of the attention in amlp layers."),
    not_yet("gpt_j_tied", bool, False, "One norm for both branches of the parallel residual."),
    not_yet("soft_prompt_tuning", dict, None, "Train a prompt of embeddings only."),
    not_yet("onnx_safe", bool, False, "Operations that ONNX can export."),
    not_yet("mamba_selective_scan_fusion", bool, False, "Mamba's scan kernel."),
    not_yet("mamba_causal_conv_fusion", bool, False, "Mamba's convolution kernel."),
    not_yet("mamba_inner_func_fusion", bool, False, "Mamba's whole-block kernel."),
    not_yet("mamba_selective_fp32_params", bool, True, "Keep Mamba's A_log and D in fp32."),
    not_yet("mamba_use_bias_in_conv", bool, True, "Bias in Mamba's convolution."),
    not_yet("mamba_use_bias_in_linears", bool, False, "Biases in Mamba's projections."),
    not_yet("dim_att", int, None, "Width of RWKV's attention."),
    not_yet("head_size", int, None, "Size of RWKV's heads."),
    not_yet("ffn_dim", int, None, "Width of RWKV's channel mixing."),
    not_yet("serve_model_weights", bool, False, "Serve weights to a sampler."),
    not_yet("te_columnparallel", bool, False, "TransformerEngine's column-parallel matrices."),
    not_yet("te_rowparallel", bool, False, "TransformerEngine's row-parallel matrices."),
    not_yet("te_layernorm_mlp", bool, False, "TransformerEngine's norm and MLP."),
    not_yet("te_mha", bool, False, "TransformerEngine's attention."),
    not_yet("te_fp8_format", Literal["e4m3", "hybrid"], "hybrid", "Format of fp8."),
    not_yet("te_fp8_wgrad", bool, True, "fp8 in weight gradients."),
    not_yet("te_fp8_amax_history_len", int, 1, "Window of fp8's maxima."),
    not_yet("te_fp8_amax_compute_algo", str, "most_recent", "Rule of fp8's maxima."),
    not_yet("te_fp8_mha", bool, False, "fp8 in attention."),
    not_yet("moe_num_experts", int, 1, "Experts of a layer."),
    not_yet("moe_expert_interval", int, 1, "Every how many layers one has experts."),
    not_yet("moe_top_k", int, 1, "Experts of a token."),
    not_yet("moe_router_type", Literal["sinkhorn", "topk"], "sinkhorn", "How tokens choose experts."),
    not_yet("moe_jitter_eps", float, None, "Noise on the router."),
    not_yet("use_mup", bool, False, "Maximal-update parametrisation."),
    not_yet("coord_check", bool, False, "muP's coordinate check."),
    not_yet("save_base_shapes", bool, False, "Write muP's base shapes."),
    not_yet("base_shapes_file", str, None, "muP's base shapes."),
    not_yet("mup_init_scale", float, 1.0, "muP's scale of initial weights."),
    not_yet("mup_embedding_mult", float, 1.0, "muP's factor of embeddings."),
    not_yet("mup_rp_embedding_mult", float, 1.0, "muP's factor of positions."),
    not_yet("mup_width_scale", int, 2, "muP's ratio of widths."),
)
