"""Rules among the keys of reliability, and between them and others."""

from neox.config.deepspeed import DeepSpeedConfig
from neox.config.optimization import BatchConfig
from neox.config.parallel import ParallelConfig
from neox.config.preference import ComparisonConfig
from neox.config.problems import Problems
from neox.config.reliability import ReliabilityConfig
from neox.config.training import CheckpointConfig


def check_elastic(
    problems: Problems, *, reliability: ReliabilityConfig, batch: BatchConfig, checkpoint: CheckpointConfig
) -> None:
    """Check that an elastic run knows its batch, whatever the number of processes."""
    if not reliability.elastic:
        return
    if (batch.elasticity or {}).get("enabled"):
        problems.add("elastic", "set together with elasticity, which gives each number of processes a batch; keep one")
    is_own = checkpoint.save is not None and checkpoint.load == checkpoint.save and not checkpoint.finetune
    if not batch.train_batch_size and not is_own:
        problems.add(
            "elastic", "the batch is to stay the same on any number of processes, and is not set; add train_batch_size"
        )


def check_restarts(problems: Problems, *, reliability: ReliabilityConfig, checkpoint: CheckpointConfig) -> None:
    """Check that a run which is started again has a folder to go on from."""
    if checkpoint.save is not None:
        return
    if reliability.max_restarts:
        problems.add("max_restarts", f"{reliability.max_restarts} restarts have nothing to go on from; set save, or 0")
    if reliability.auto_resume:
        problems.add("auto_resume", "goes on from the checkpoints in save, which is not set; set it, or remove the key")


def check_bad_steps(
    problems: Problems,
    *,
    reliability: ReliabilityConfig,
    checkpoint: CheckpointConfig,
    comparison: ComparisonConfig,
    deepspeed: DeepSpeedConfig,
) -> None:
    """Check that a run can go back where it is to, and that updates can be left out."""
    for key in _rewinding(reliability):
        if checkpoint.save is None:
            problems.add(key, "rewind goes back to a checkpoint, and save is not set; set it, or another action")
        elif checkpoint.no_save_optim:
            problems.add(key, "rewind needs the optimizer's state, and no_save_optim is true; remove it")
        if comparison.dataset_impl == "online":
            problems.add(key, "rewind reads data again, and a server of completions gives others; set another action")
    guarded = [key for key, is_on in _guards(reliability).items() if is_on and getattr(reliability, key) != "stop"]
    if guarded and (deepspeed.zero_optimization or {}).get("zenflow"):
        problems.add(guarded[0], "zenflow updates weights while a step is under way, so none can be left out; set stop")


def _guards(reliability: ReliabilityConfig) -> dict[str, bool]:
    """The keys of actions about bad steps, and whether anything asks for them."""
    return {
        "on_bad_loss": True,
        "on_large_gradient": reliability.gradient_norm_limit is not None,
        "on_loss_spike": reliability.loss_spike_deviations is not None,
    }


def _rewinding(reliability: ReliabilityConfig) -> list[str]:
    """The keys that say rewind and are not idle."""
    asked = _guards(reliability) | {"on_replica_mismatch": reliability.replica_check_interval > 0}
    return [key for key, is_on in asked.items() if is_on and getattr(reliability, key) == "rewind"]


def check_comparisons(
    problems: Problems,
    notices: list[str],
    *,
    reliability: ReliabilityConfig,
    parallel: ParallelConfig,
    deepspeed: DeepSpeedConfig,
) -> None:
    """Check that copies are equal in a run in which nothing fails; say what comparing cannot find at this layout."""
    if reliability.replica_check_interval and (deepspeed.zero_optimization or {}).get("zenflow"):
        problems.add(
            "replica_check_interval",
            "zenflow updates masters while a step is under way, so weights differ from them; set 0",
        )
    if parallel.data_parallel_size is None:
        return
    of_a_stage = parallel.data_parallel_size * parallel.model_parallel_size
    if reliability.replica_check_interval and parallel.zero_stage == 3:
        notices.append(
            "replica_check_interval: at ZeRO 3 no rank holds another's weights; compared are the weights of each with "
            "its masters, and parameters that tensor ranks share or that stay whole"
        )
    elif reliability.replica_check_interval and of_a_stage == 1 and parallel.zero_stage == 0:
        notices.append("replica_check_interval: one process has nothing twice, so nothing is compared")
    if reliability.straggler_factor is not None and of_a_stage == 1:
        notices.append("straggler_factor: ranks of one stage are compared, and here each stage has one")
