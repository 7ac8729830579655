"""train.py whose ranks wait, a few steps before the last one, as long as a file `hold` lies beside the configuration.

What a test does to a run in its middle comes before its end then, however slow the test is.
"""

import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS_LEFT = 4


def install(hold: Path, last_iteration: int) -> None:
    """Have the maker of batches wait while the file is there, and until the run is asked to end."""
    from neox.training.batches import BatchMaker
    from neox.training.signals import Signals
    from neox.watch import phase

    make, note, asked = BatchMaker.for_step, Signals.note, []

    def for_step(maker: Any, loader: Any, progress: Any) -> Any:
        if progress.iteration == last_iteration - STEPS_LEFT:
            with phase("held by a test", lawful=True):
                while hold.exists() and not asked:
                    time.sleep(0.02)
        return make(maker, loader, progress)

    def noted(signals: Any, signum: int, frame: Any = None) -> None:
        asked.append(signum)
        note(signals, signum, frame)

    BatchMaker.for_step, Signals.note = for_step, noted  # type: ignore[method-assign]


def main(argv: list[str]) -> int:
    """Run train.py's own."""
    sys.path.insert(0, str(ROOT))
    import train
    from neox.training import run

    begin = run.train
    configuration = next(Path(word) for word in argv if word.endswith(".yml"))

    def held(config: Any) -> Any:
        install(configuration.with_name("hold"), config.training.train_iters)
        return begin(config)

    run.train = held
    return train.main(argv)


if __name__ == "__main__":
    from neox.launch.main import leave, script_main

    leave(script_main(main))  # which starts ranks as sys.argv[0], so as this file
