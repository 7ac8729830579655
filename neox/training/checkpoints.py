"""Taking a saved run up again."""

from neox.checkpoint.native.manifest import Layout, Progress
from neox.checkpoint.runs import RunReader
from neox.config import Config
from neox.parallel.mesh import Mesh
from neox.parallel.rng import seed_dropout, set_rng_state
from neox.training.engine import Engine
from neox.training.forward_check import check_forward
from neox.training.state import restore

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def resume_run(engine: Engine, reader: RunReader, *, whole: bool = False) -> Progress:
    """Put a checkpoint's state into an engine that has its weights, and the dropout stream where it was.

    Args:
        engine: without a state of its optimizer.
        reader: the checkpoint.
        whole: take everything up, whatever `no_load_optim` and `no_load_rng` say, which are about `load`.
    """
    config = engine.config
    restore(engine, reader, with_optimizer=whole or not config.checkpoint.no_load_optim)
    progress = reader.manifest.progress
    set_scaler_state(engine, progress.loss_scaler)
    check_forward(engine, reader)
    restore_dropout_stream(config, engine.mesh, reader, whole=whole)
    return progress


def restore_dropout_stream(config: Config, mesh: Mesh, reader: RunReader, *, whole: bool = False) -> None:
    """Continue each rank's stream exactly where the layout is the one that saved it; start new ones where it is not.

    A new stream is seeded by (seed, iteration, stage, data rank), so no numbers are drawn twice.
    """
    key = f"rng/{mesh.rank}"
    same_layout = reader.manifest.layout == layout_of(config, mesh)
    if same_layout and key in reader and (whole or not config.checkpoint.no_load_rng):
        set_rng_state(reader.tensor(key), mesh.device)
    else:
        seed_dropout(config.training.seed, mesh, step=reader.manifest.progress.iteration)


def layout_of(config: Config, mesh: Mesh) -> Layout:
    """The grid as a checkpoint records it."""
    return Layout(
        pipe_parallel_size=mesh.pipe_size,
        data_parallel_size=mesh.data_size,
        model_parallel_size=mesh.tensor_size,
        zero_stage=config.parallel.zero_stage,
    )


def set_scaler_state(engine: Engine, state: dict[str, float]) -> None:
    """Let a scale that moves go on; a fixed one (`fp16.loss_scale`) is what the configuration says."""
    if engine.config.model.precision != "fp16":
        return
    scaler = engine.deepspeed.optimizer.loss_scaler
    for field, value in state.items() if scaler.dynamic else ():
        setattr(scaler, field, value)
