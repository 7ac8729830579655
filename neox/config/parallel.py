"""How the model is spread over processes."""

from neox.config.keys import Int, Section, derived, internal, no_effect, setting


class ParallelConfig(Section):
    """Sizes of the pipeline, data and tensor dimensions, from the slowest of a rank to the fastest."""

    pipe_parallel_size: Int = setting(
        0,
        "Pipeline stages; 0 and 1 run without the pipeline engine.",
        ge=0,
        rule="At most num_layers; above 1 only with ZeRO 0 or 1.",
    )
    model_parallel_size: Int = setting(
        1,
        "Tensor-parallel size.",
        gt=0,
        rule="Divides num_attention_heads, num_kv_heads and the inner width of the MLP; with the pipeline stages, the "
        "number of processes.",
    )
    sequence_parallel: bool = setting(
        False,
        "Split norms and dropouts along the sequence over tensor ranks; off when model_parallel_size is 1.",
        rule="model_parallel_size divides seq_length.",
    )
    pipe_partition_method: str = setting(
        "type:transformer|mlp", "How layers are dealt to stages: parameters, uniform or type:REGEX."
    )
    zero_stage: int = derived(0, "ZeRO stage that runs, which may be above the one asked for.")
    world_size: int | None = derived(None, "Number of processes; None before launch.")
    data_parallel_size: int | None = derived(None, "world_size / (pipeline stages x model_parallel_size).")

    @property
    def pipeline_stages(self) -> int:
        """Number of pipeline stages, at least 1."""
        return max(1, self.pipe_parallel_size)


_COUNTED = "leave it out: the launcher counts processes"

OTHER_KEYS = (
    internal("world_size", int, "Number of processes.", instead=_COUNTED),
    internal("global_num_gpus", int, "Number of devices.", instead=_COUNTED),
    internal("rank", int, "Number of this process.", instead=_COUNTED),
    internal("local_rank", int, "Number of this process on its host.", instead=_COUNTED),
    internal("is_pipe_parallel", bool, "Whether there is a pipeline.", instead="set pipe_parallel_size"),
    no_effect("lazy_mpu_init", bool, False, "Delay the making of process groups."),
)
