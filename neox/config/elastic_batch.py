"""The batch of an elastic run: the same number of sequences a step on any number of data-parallel ranks."""

from neox.config.optimization import BatchConfig
from neox.config.parallel import ParallelConfig
from neox.config.problems import Problems

_NAMED = 8
"""Numbers of processes that an error names, the nearest ones."""


def share_batch(batch: BatchConfig, parallel: ParallelConfig, problems: Problems, notices: list[str]) -> BatchConfig:
    """Divide `train_batch_size` among the ranks: accumulation steps follow, and the micro batch where it must.

    The micro batch is the largest one up to what is configured that divides a rank's share.
    """
    ranks, total = parallel.data_parallel_size, batch.train_batch_size
    assert ranks is not None, "the number of ranks is known"
    if total % ranks:
        replica = parallel.pipeline_stages * parallel.model_parallel_size
        problems.add("train_batch_size", _refusal(total, ranks, replica=replica))
        return batch
    share = total // ranks
    micro, steps = batch.train_micro_batch_size_per_gpu, batch.gradient_accumulation_steps
    most = min(micro or max(1, share // (steps or 1)), share)
    runs = next(size for size in range(most, 0, -1) if share % size == 0)
    each = f"elastic, {total} sequences over {ranks} data-parallel ranks"
    if micro and runs != micro:
        notices.append(f"train_micro_batch_size_per_gpu {micro} runs as {runs}: {each}")
    if steps and steps != share // runs:
        notices.append(f"gradient_accumulation_steps {steps} runs as {share // runs}: {each}")
    return batch.model_copy(
        update={"train_micro_batch_size_per_gpu": runs, "gradient_accumulation_steps": share // runs}
    )


def _refusal(total: int, ranks: int, *, replica: int) -> str:
    """Say which numbers of processes can share the batch."""
    divisors = [count for count in range(1, total + 1) if total % count == 0]
    nearest = sorted(sorted(divisors, key=lambda count: abs(count - ranks))[:_NAMED])
    processes = ", ".join(str(count * replica) for count in nearest)
    return f"{total} sequences cannot be shared by {ranks} data-parallel ranks; start one of {processes} processes"
