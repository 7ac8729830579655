"""What a run can be taken up from: weights, optimizer state, and how far it had come."""

from pathlib import Path
from typing import Protocol

from neox.checkpoint.native.manifest import Manifest, is_native
from neox.checkpoint.native.store import NativeReader
from neox.checkpoint.upstream.files import is_upstream
from neox.checkpoint.upstream.reader import NO_HINTS, Hints
from neox.checkpoint.upstream.run import UpstreamRun
from neox.checkpoint.weights import WeightReader

MASTER = "master"
"""Name of the fp32 weights among the states of a parameter in half precision."""


class RunReader(WeightReader, Protocol):
    """A checkpoint of a run, in any format.

    Beside the parameters, `in` and `tensor` know the keys `<name>/<state>`: `master`, and what the optimizer keeps
    (`exp_avg` and `exp_avg_sq` for Adam), whole, in fp32.
    """

    @property
    def manifest(self) -> Manifest:
        """Everything but the tensors."""
        ...


def open_run(folder: Path, *, hints: Hints = NO_HINTS, with_optimizer: bool = True) -> RunReader | None:
    """Open a checkpoint as a run to go on with; None where it holds weights and no run.

    Args:
        folder: of one checkpoint.
        hints: see `UpstreamReader`.
        with_optimizer: whether the optimizer's state is wanted. Without, weights that GPT-NeoX saved alone are a run
            too: how far it had come is known.

    Raises:
        CheckpointError: it is damaged, or of a kind that cannot be gone on with.
    """
    if is_native(folder):
        native = NativeReader(folder)
        return native if native.manifest.schedule else None
    if not is_upstream(folder):
        return None
    upstream = UpstreamRun(folder, hints=hints, with_optimizer=with_optimizer)
    return upstream if upstream.manifest.optimizer is not None or not with_optimizer else None
