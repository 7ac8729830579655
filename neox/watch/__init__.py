"""Nothing hangs in silence: every process of a run is watched, and one that is lost or stalls is named."""

from neox.watch.session import watched
from neox.watch.signs import at_step, phase

__all__ = ["at_step", "phase", "watched"]
