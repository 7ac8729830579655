"""What is reported, and where."""

from neox.config.keys import Float, Int, Section, internal, not_yet, setting


class LoggingConfig(Section):
    """Console, files, TensorBoard and Weights & Biases."""

    log_interval: Int = setting(100, "Iterations between reports.", gt=0)
    steps_per_print: Int = setting(10, "Iterations between DeepSpeed's own reports.", gt=0)
    log_dir: str | None = setting(None, "Folder for logs.")
    log_grad_norm: bool = setting(False, "Report the norm of the gradients.")
    peak_theoretical_tflops: Float | None = setting(
        None, "Peak TFLOP/s of one device, for MFU and HFU; absent: known for common GPUs.", gt=0
    )
    wall_clock_breakdown: bool = setting(False, "Time the phases of a step.")
    tensorboard_dir: str | None = setting(None, "Folder for TensorBoard.")
    use_wandb: bool | None = setting(None, "Report to Weights & Biases; absent: when a key is found.")
    wandb_group: str | None = setting(None, "Group of the run.")
    wandb_run_name: str | None = setting(None, "Name of the run.")
    wandb_team: str | None = setting(None, "Team that owns the run.")
    wandb_project: str = setting("neox", "Project of the run.")
    wandb_host: str = setting("https://api.wandb.ai", "Server of the run.")


OTHER_KEYS = (
    internal("git_hash", str, "Commit of the code.", instead="leave it out: it is recorded anyway"),
    internal("tensorboard_writer", str, "The TensorBoard object.", instead="set tensorboard_dir"),
    internal("comet_experiment", str, "The Comet object.", instead="leave it out"),
    not_yet("wandb_init_all_ranks", bool, False, "A run for each process."),
    not_yet("use_comet", bool, None, "Report to Comet."),
    not_yet("comet_workspace", str, None, "Workspace of Comet."),
    not_yet("comet_project", str, None, "Project of Comet."),
    not_yet("comet_experiment_name", str, None, "Name at Comet."),
    not_yet("comet_tags", list, None, "Tags at Comet."),
    not_yet("comet_others", dict, None, "Further data at Comet."),
    not_yet("log_grad_pct_zeros", bool, False, "Report the share of zero gradients."),
    not_yet("log_param_norm", bool, False, "Report norms of parameters."),
    not_yet("log_optimizer_states", bool, False, "Report norms of optimizer state."),
    not_yet("log_gradient_noise_scale", bool, False, "Report the gradient noise scale."),
    not_yet("gradient_noise_scale_n_batches", int, 5, "Batches of the noise scale."),
    not_yet("gradient_noise_scale_cpu_offload", bool, False, "Keep gradients of the noise scale on the CPU."),
    not_yet("memory_profiling", bool, False, "Record memory."),
    not_yet("memory_profiling_path", str, None, "Folder for memory records."),
    not_yet("profile", bool, False, "Profile some iterations."),
    not_yet("profile_step_start", int, 10, "First profiled iteration."),
    not_yet("profile_step_stop", int, 12, "Iteration where profiling ends."),
)
