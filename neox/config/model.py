"""The model: its shape, its formula and its initial weights."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from neox.config.keys import Float, Int, Lower, Section, as_tuple, dead, derived, no_effect, not_yet, setting

_INITS = Literal[
    "normal",
    "scaled_normal",
    "small_init",
    "wang_init",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
    "single_residual_scaled_normal",
]
Norm = Literal["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm", "te_layernorm", "te_rmsnorm"]
Activation = Literal["gelu", "relu", "softsign", "swish", "silu", "mish", "geglu", "swiglu", "reglu", "bilinear", "glu"]
GATED_ACTIVATIONS = ("geglu", "swiglu", "reglu", "bilinear", "glu")

PRECISION_ALIASES = {"bf16": "bfloat16", "float16": "fp16", "float32": "fp32"}


def precision_name(value: Any) -> Any:
    """Spell a precision upstream's way: bf16 is bfloat16."""
    name = value.lower() if isinstance(value, str) else value
    return PRECISION_ALIASES.get(name, name) if isinstance(name, str) else name


class ModelConfig(Section):
    """A decoder of `num_layers` blocks of width `hidden_size`."""

    num_layers: Int = setting(..., "Number of blocks.", gt=0, le=100_000)
    hidden_size: Int = setting(..., "Width of the residual stream.", rule="A multiple of num_attention_heads.", gt=0)
    num_attention_heads: Int = setting(
        ..., "Attention heads of a block.", gt=0, rule="Divides hidden_size; a multiple of model_parallel_size."
    )
    num_kv_heads: Int = setting(
        0,
        "Heads of keys and values, shared by groups of queries; absent: all.",
        gt=0,
        rule="Divides num_attention_heads; a multiple of model_parallel_size.",
    )
    intermediate_size: Int = setting(
        0,
        "Width of the MLP; with a gated activation a third of it is the inner width, of up and gate each.",
        rule="Absent: expansion_factor x hidden_size, or 4 x hidden_size. The inner width is rounded up to a multiple "
        "of mlp_multiple_of, and must divide by model_parallel_size.",
        gt=0,
    )
    expansion_factor: Float | None = setting(
        None,
        "Width of the MLP as a multiple of hidden_size.",
        rule="Not together with intermediate_size.",
        gt=0,
        le=1000,
    )
    mlp_multiple_of: Int = setting(1, "The inner width of the MLP is rounded up to a multiple of this.", gt=0)
    seq_length: Int = setting(
        ..., "Tokens of a training sequence.", rule="At most max_position_embeddings less opt_pos_emb_offset.", gt=0
    )
    max_position_embeddings: Int = setting(
        0,
        "Longest sequence in tokens; the rows of learned positions.",
        rule="Absent: seq_length + opt_pos_emb_offset.",
        gt=0,
    )
    norm: Norm = setting(
        "layernorm", "Normalisation.", rule="te_layernorm and te_rmsnorm run as layernorm and rmsnorm."
    )
    layernorm_epsilon: Float = setting(1e-5, "Epsilon of layernorm and non_parametric_layernorm.", gt=0)
    rms_norm_epsilon: Float = setting(1e-8, "Epsilon of rmsnorm, inside the root.", gt=0)
    scalenorm_epsilon: Float = setting(1e-8, "Smallest length that scalenorm divides by.", gt=0)
    use_qk_layernorm: bool = setting(False, "Normalise queries and keys by the norm of the model.")
    embedding_norm: bool = setting(False, "Normalise the embeddings before the first block, as BLOOM does.")
    pos_emb: Annotated[Literal["learned", "rotary", "sinusoidal", "alibi", "none"], Lower] = setting(
        "learned", "Position encoding.", upstream=("rpe",)
    )
    opt_pos_emb_offset: Int = setting(
        0, "Shift of learned positions inside their table; OPT has 2.", rule="Only with pos_emb learned.", ge=0
    )
    rotary_pct: Float = setting(
        1.0, "Share of each head that is rotated.", gt=0, le=1, rule="Gives an even number of dimensions of a head."
    )
    rotary_emb_base: Float = setting(10000, "Base of the rotary frequencies.", gt=0)
    rope_scaling: dict[str, Any] | None = setting(
        None,
        "Rotary positions beyond those trained on: rope_type linear, dynamic, yarn or llama3, and its numbers.",
        rule="For pos_emb rotary.",
    )
    sliding_window_width: Int | None = setting(
        None, "Keys a query sees before its own; Hugging Face's sliding_window counts that too. Absent: all.", gt=0
    )
    no_weight_tying: bool = setting(False, "Give the output head a matrix of its own.")
    activation: Activation = setting("gelu", "Nonlinearity of the MLP.")
    bias_gelu_fusion: bool = setting(
        False, "GELU by its tanh approximation, not the exact erf.", rule="Only activation gelu has this form."
    )
    gpt_j_residual: bool = setting(False, "Parallel residual: x + attention(ln1(x)) + mlp(ln2(x)).")
    gpt_j_tied: bool = setting(
        False, "Both branches of the parallel residual read one norm.", rule="Only with gpt_j_residual."
    )
    use_bias_in_attn_linear: bool = setting(True, "Biases in the two matrices of attention.")
    use_bias_in_mlp: bool = setting(
        True, "Biases in the two matrices of the MLP.", rule="Experts have none: false where all blocks have experts."
    )
    moe_num_experts: Int = setting(
        1,
        "Experts of a block, each an MLP of its own without biases; 1: one MLP for all tokens.",
        gt=0,
    )
    moe_expert_interval: Int = setting(
        1, "Every how many blocks one has experts, the first one always; the others have one MLP.", gt=0
    )
    moe_top_k: Int = setting(1, "Experts that a token goes to.", gt=0, rule="At most moe_num_experts.")
    moe_router_type: Literal["sinkhorn", "topk"] = setting(
        "sinkhorn",
        "How tokens choose: topk takes the most probable experts, sinkhorn in training those of a balanced plan.",
        rule="sinkhorn is for moe_top_k 1.",
    )
    moe_normalize_weights: bool = setting(
        False,
        "Scale the probabilities of a token's experts to a sum of 1, as Mixtral does; else they weigh as they are.",
        rule="Absent: true with moe_router_type topk and moe_top_k above 1. Not with sinkhorn.",
    )
    moe_jitter_eps: Float | None = setting(
        None,
        "The router reads its input times uniform noise from 1 - eps to 1 + eps in training.",
        rule="Only with moe_router_type topk.",
        gt=0,
        lt=1,
    )
    moe_aux_loss_coeff: Float = setting(
        0.001,
        "Factor of the load-balancing loss, a mean over blocks with experts, in what is minimised.",
        rule="Only with moe_router_type topk.",
        ge=0,
    )
    moe_z_loss_coeff: Float = setting(
        0.0, "Factor of the mean squared log-normaliser of the router, which keeps its logits small.", ge=0
    )
    hidden_dropout: Float = setting(0.0, "Dropout before each residual addition and on embeddings.", ge=0, lt=1)
    attention_dropout: Float = setting(0.0, "Dropout on attention probabilities.", ge=0, lt=1)
    init_method: _INITS = setting("normal", "Initialiser of embeddings and input matrices.")
    output_layer_init_method: _INITS = setting(
        "scaled_normal",
        "Initialiser of the matrices that write to the residual stream.",
    )
    init_method_std: Float = setting(0.02, "Standard deviation of the normal kinds, before their scaling.", gt=0)
    padded_vocab_size: Int | None = setting(
        None,
        "Rows of the embedding; absent: from the tokenizer.",
        gt=0,
        rule="Absent: the checkpoint's, else the tokenizer's size rounded up by make_vocab_size_divisible_by.",
    )
    make_vocab_size_divisible_by: Int = setting(
        128,
        "The vocabulary is padded to a multiple of this times model_parallel_size.",
        gt=0,
        rule="Used when padded_vocab_size is absent.",
    )
    precision: Annotated[Literal["fp32", "fp16", "bfloat16"], BeforeValidator(precision_name)] = setting(
        "fp32",
        "Type of parameters and arithmetic; absent: from the fp16 and bf16 sections, else fp32.",
        rule="Agrees with fp16.enabled and bf16.enabled.",
    )
    compile: bool | None = setting(None, "Compile the blocks with torch.compile; absent: where it pays.")
    attention_config: Annotated[tuple[Any, ...], BeforeValidator(as_tuple)] | None = setting(
        None,
        "Attention of each layer, e.g. [[[flash], 12]]; global and flash are the same operation here.",
        rule="Describes exactly num_layers layers; the word all fills what is left.",
    )
    attention_types: tuple[str, ...] = derived((), "attention_config spelled out, one name a layer.")
    has_reward_head: bool = derived(False, "Whether the head gives a reward, as train_impl rm trains it, not logits.")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies two projections."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def has_experts(self) -> bool:
        """Whether some blocks have experts."""
        return self.moe_num_experts > 1

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Which blocks have experts, counted from 0."""
        return tuple(range(0, self.num_layers, self.moe_expert_interval)) if self.has_experts else ()

    @property
    def mlp_inner_width(self) -> int:
        """Width between the two matrices of the MLP: what linear2 reads.

        A gated MLP has three matrices instead of two, so upstream takes a third of `intermediate_size` for each of
        up and gate. Upstream rounds the two together and the inner width apart, and cannot build a model where the
        results disagree; here the inner width is half of the two, rounded up to a multiple of `mlp_multiple_of`,
        which is the same wherever upstream's works.
        """
        multiple = self.mlp_multiple_of
        if not self.is_gated:
            return -(-self.intermediate_size // multiple) * multiple
        both = 2 * self.intermediate_size // 3
        return -(-both // (2 * multiple)) * multiple

    @property
    def linear1_width(self) -> int:
        """Rows of linear1: the inner width, or up and gate of that width each."""
        return 2 * self.mlp_inner_width if self.is_gated else self.mlp_inner_width

    @property
    def qkv_width(self) -> int:
        """Rows of the fused projection to queries, keys and values."""
        return (self.num_attention_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def is_grouped(self) -> bool:
        """Whether groups of query heads share a head of keys and values (GQA; MQA with one)."""
        return self.num_kv_heads != self.num_attention_heads

    @property
    def rotary_ndims(self) -> int:
        """Leading dimensions of a head that are rotated."""
        return int(self.head_dim * self.rotary_pct)


OTHER_KEYS = (
    no_effect("layernorm_fusion", bool, False, "Fused layer normalisation."),
    no_effect("rmsnorm_fusion", bool, False, "Fused RMS normalisation."),
    no_effect("use_flashattn_swiglu", bool, False, "SwiGLU kernel of flash-attn."),
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
    no_effect("fp16_lm_cross_entropy", bool, False, "Loss in fp16; it is always fp32."),
    no_effect("moe_lbl_in_fp32", bool, False, "Load-balancing loss in fp32, as it always is here."),
    no_effect("onnx_safe", bool, False, "Operations that ONNX can export."),
    no_effect("te_columnparallel", bool, False, "TransformerEngine's column-parallel matrices."),
    no_effect("te_rowparallel", bool, False, "TransformerEngine's row-parallel matrices."),
    no_effect("te_layernorm_mlp", bool, False, "TransformerEngine's norm and MLP."),
    no_effect("te_mha", bool, False, "TransformerEngine's attention."),
    no_effect("te_fp8_format", Literal["e4m3", "hybrid"], "hybrid", "Format of fp8."),
    no_effect("te_fp8_wgrad", bool, True, "fp8 in weight gradients."),
    no_effect("te_fp8_amax_history_len", int, 1, "Window of fp8's maxima."),
    no_effect("te_fp8_amax_compute_algo", str, "most_recent", "Rule of fp8's maxima."),
    no_effect("serve_model_weights", bool, False, "Hand GPU memory to one vendor's sampler by pickle."),
    dead("num_unique_layers", int, None, "Layers with weights of their own."),
    dead("param_sharing_style", str, "grouped", "Order of shared layers."),
    dead("use_bias_in_norms", bool, True, "Biases in norms."),
    dead("weight_server_port", int | list, 6000, "Port of the weight server."),
    dead("te_fp8_margin", int, 0, "Margin of the fp8 scale."),
    dead("mup_attn_temp", float, 1.0, "muP temperature of attention."),
    dead("mup_output_temp", float, 1.0, "muP temperature of the output."),
    not_yet("rpe_num_buckets", int, 32, "Buckets of relative positions."),
    not_yet("rpe_max_distance", int, 128, "Largest relative position."),
    not_yet("sparsity_config", dict, None, "Settings of block-sparse attention."),
    not_yet("sparse_attention", dict, None, "DeepSpeed's settings of sparse attention."),
    not_yet("gmlp_attn_dim", int, 64, "Width of the attention in amlp layers."),
    not_yet("soft_prompt_tuning", dict, None, "Train a prompt of embeddings only."),
    not_yet("mamba_selective_scan_fusion", bool, False, "Mamba's scan kernel."),
    not_yet("mamba_causal_conv_fusion", bool, False, "Mamba's convolution kernel."),
    not_yet("mamba_inner_func_fusion", bool, False, "Mamba's whole-block kernel."),
    not_yet("mamba_selective_fp32_params", bool, True, "Keep Mamba's A_log and D in fp32."),
    not_yet("mamba_use_bias_in_conv", bool, True, "Bias in Mamba's convolution."),
    not_yet("mamba_use_bias_in_linears", bool, False, "Biases in Mamba's projections."),
    not_yet("dim_att", int, None, "Width of RWKV's attention."),
    not_yet("head_size", int, None, "Size of RWKV's heads."),
    not_yet("ffn_dim", int, None, "Width of RWKV's channel mixing."),
    not_yet("te_fp8_mha", bool, False, "fp8 in attention."),
    not_yet("use_mup", bool, False, "Maximal-update parametrisation."),
    not_yet("coord_check", bool, False, "muP's coordinate check."),
    not_yet("save_base_shapes", bool, False, "Write muP's base shapes."),
    not_yet("base_shapes_file", str, None, "muP's base shapes."),
    not_yet("mup_init_scale", float, 1.0, "muP's scale of initial weights."),
    not_yet("mup_embedding_mult", float, 1.0, "muP's factor of embeddings."),
    not_yet("mup_rp_embedding_mult", float, 1.0, "muP's factor of positions."),
    not_yet("mup_width_scale", int, 2, "muP's ratio of widths."),
)
