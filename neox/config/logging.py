"""What is reported, and where."""

from typing import Any

from neox.config.keys import Float, Int, Section, Strings, Text, internal, setting


class LoggingConfig(Section):
    """Console, files, TensorBoard, Weights & Biases, Comet; what is measured beside the loss."""

    log_interval: Int = setting(100, "Iterations between reports.", gt=0)
    steps_per_print: Int = setting(10, "Iterations between DeepSpeed's own reports.", gt=0)
    log_dir: Text | None = setting(
        None,
        "Folder for <host>_stdout.txt and <host>_stderr.txt, copies of what workers print, and other logs.",
        rule="Absent: files of ranks go to the folder logs of save.",
    )
    log_file_size: Int = setting(
        16 * 2**20,
        "Bytes after which a rank begins another file of what it prints; 0 for no such files.",
        ge=0,
        rule="They are in ranks below log_dir, else below logs in save.",
    )
    log_file_count: Int = setting(4, "Earlier files of a rank that are kept.", ge=0)
    log_grad_norm: bool = setting(False, "Report the L2 norm of each parameter's gradient, before clipping.")
    log_grad_pct_zeros: bool = setting(False, "Report the share of zeros in each parameter's gradient, in percent.")
    log_param_norm: bool = setting(False, "Report the L2 norm of each parameter.")
    log_optimizer_states: bool = setting(False, "Report the L2 norm of each tensor the optimizer keeps.")
    log_gradient_noise_scale: bool = setting(
        False, "Report the gradient noise scale, in sequences (McCandlish et al. 2018)."
    )
    gradient_noise_scale_n_batches: Int = setting(5, "Steps whose gradients make the large batch of an estimate.", ge=2)
    gradient_noise_scale_cpu_offload: bool = setting(False, "Keep the sum of those gradients on the CPU.")
    memory_profiling: bool = setting(False, "Record the allocations of CUDA memory, until profile_step_stop.")
    memory_profiling_path: Text | None = setting(None, "Folder for those records; absent: memory, beside the metrics.")
    profile: bool = setting(False, "Write a torch.profiler trace of some iterations.")
    profile_step_start: Int = setting(10, "First profiled iteration, counted from 1.", ge=1)
    profile_step_stop: Int = setting(
        12, "Iteration that is no longer profiled.", ge=2, rule="Above profile_step_start."
    )
    peak_theoretical_tflops: Float | None = setting(
        None, "Peak TFLOP/s of one device, for MFU and HFU; absent: known for common GPUs.", gt=0
    )
    wall_clock_breakdown: bool = setting(False, "Time the phases of a step.")
    tensorboard_dir: Text | None = setting(None, "Folder for TensorBoard.")
    use_wandb: bool | None = setting(
        None,
        "Report to Weights & Biases; absent: when a key is found.",
        rule="Absent: on when WANDB_API_KEY, WANDB_LOCAL or a netrc entry for wandb_host is found.",
    )
    wandb_group: Text | None = setting(None, "Group of the run.")
    wandb_run_name: Text | None = setting(None, "Name of the run.")
    wandb_team: Text | None = setting(None, "Team that owns the run.")
    wandb_project: Text = setting("neox", "Project of the run.")
    wandb_host: Text = setting("https://api.wandb.ai", "Server of the run.")
    wandb_init_all_ranks: bool = setting(False, "Make a run for each process, and not for the first alone.")
    use_comet: bool | None = setting(None, "Report to Comet.")
    comet_workspace: Text | None = setting(None, "Workspace of the experiment; absent: Comet's own configuration.")
    comet_project: Text | None = setting(None, "Project of the experiment; absent: Comet's own configuration.")
    comet_experiment_name: Text | None = setting(None, "Name of the experiment.")
    comet_tags: Strings | None = setting(None, "Tags of the experiment.")
    comet_others: dict[str, Any] | None = setting(None, "Further values recorded with the experiment.")


OTHER_KEYS = (
    internal("git_hash", str, "Commit of the code.", instead="leave it out: it is recorded anyway"),
    internal("tensorboard_writer", str, "The TensorBoard object.", instead="set tensorboard_dir"),
    internal("comet_experiment", str, "The Comet object.", instead="leave it out"),
)
