"""Which layouts are legal, and what each runs as: one table.

Tensor and sequence parallelism go with every row, and so are columns that say how.
"""

from collections.abc import Iterator
from dataclasses import dataclass

ANY_PRECISION = ("fp32", "fp16", "bfloat16")
HALF_PRECISION = ("fp16", "bfloat16")


@dataclass(frozen=True)
class Layout:
    """A row of the table.

    Args:
        pipeline: whether there are two or more pipeline stages.
        zero_stages: ZeRO stages asked for.
        precisions: precisions it covers.
        runs_as: ZeRO stage it runs as, None for the one asked for.
        refusal: why it is illegal and the nearest legal layouts; empty if it is legal.
        reason: why it does not run as the stage asked for.
    """

    pipeline: bool
    zero_stages: tuple[int, ...]
    precisions: tuple[str, ...]
    runs_as: int | None = None
    refusal: str = ""
    reason: str = ""


LAYOUTS = (
    Layout(pipeline=False, zero_stages=(0,), precisions=("fp32",)),
    Layout(
        pipeline=False,
        zero_stages=(0,),
        precisions=HALF_PRECISION,
        runs_as=1,
        reason="ZeRO 0 in half precision takes a wrong first step; stage 1 keeps fp32 masters",
    ),
    Layout(pipeline=False, zero_stages=(1, 2, 3), precisions=ANY_PRECISION),
    Layout(
        pipeline=True,
        zero_stages=(0,),
        precisions=ANY_PRECISION,
        runs_as=1,
        reason="ZeRO 0 under a pipeline clips by the gradients of the first stage only",
    ),
    Layout(pipeline=True, zero_stages=(1,), precisions=ANY_PRECISION),
    Layout(
        pipeline=True,
        zero_stages=(2, 3),
        precisions=ANY_PRECISION,
        refusal="ZeRO {stage} shards gradients, which a pipeline needs whole; "
        "set zero_optimization.stage: 1, or pipe_parallel_size: 1",
    ),
)


def find_layout(*, pipeline_stages: int, zero_stage: int, precision: str) -> Layout:
    """Find the row that covers a layout.

    Args:
        pipeline_stages: number of stages, 1 without a pipeline.
        zero_stage: ZeRO stage asked for, 0 to 3.
        precision: `fp32`, `fp16` or `bfloat16`.
    """
    found = [
        row
        for row in LAYOUTS
        if row.pipeline == (pipeline_stages >= 2) and zero_stage in row.zero_stages and precision in row.precisions
    ]
    assert len(found) == 1, f"the table of layouts has {len(found)} rows for this layout, not 1"
    return found[0]


def markdown() -> str:
    """Write docs/layouts.md."""
    header = (
        "# Legal layouts\n",
        "What each combination of pipeline, tensor and sequence parallelism, ZeRO stage and precision runs as. Where",
        "the stage that runs is not the stage asked for, the run says so in one line.",
        "`python -m neox.config layouts` prints this page.\n",
        "| pipe_parallel_size | model_parallel_size | sequence_parallel | ZeRO stage | precision | runs as | remark |",
        "|---|---|---|---|---|---|---|",
    )
    return "\n".join([*header, *_rows()]) + "\n"


def _rows() -> Iterator[str]:
    for row in LAYOUTS:
        for stage in row.zero_stages:
            engine = "pipeline engine" if row.pipeline else "plain engine"
            runs_as = "refused" if row.refusal else f"{engine}, ZeRO {stage if row.runs_as is None else row.runs_as}"
            cells = (
                "2 or more" if row.pipeline else "0 or 1",
                "any",
                "any; needs model_parallel_size 2 or more to act",
                str(stage),
                ", ".join(row.precisions),
                runs_as,
                row.refusal.format(stage=stage) or row.reason,
            )
            yield f"| {' | '.join(cells)} |"
