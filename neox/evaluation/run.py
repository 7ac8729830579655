"""What `evaluate.py` does."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neox.config import Config
from neox.data.tokenizers import Tokenizer
from neox.errors import UserError
from neox.evaluation.harness import require_harness
from neox.evaluation.tasks import find_tasks
from neox.files import require_place, write_new
from neox.inference.loading import load_model, open_model
from neox.launch.reporting import tell
from neox.model.layers import Decoder
from neox.parallel.mesh import Mesh
from neox.results import print_result
from neox.secrets import masked_values

if TYPE_CHECKING:
    from neox.evaluation.adapter import HarnessModel


def run_evaluation(config: Config, mesh: Mesh) -> None:
    """Load the model, evaluate `eval_tasks` and write the results; every process of `mesh` calls this.

    Raises:
        UserError: of the checkpoint, the tasks or the result file.
    """
    tasks = find_tasks(config.evaluation.eval_tasks or ())
    if mesh.rank == 0:
        require_place(result_path(config.evaluation.eval_results_prefix, datetime.now()))
    model, tokenizer = load_model(config, mesh)
    results = evaluate_model(model, tokenizer, config, tasks=tasks, mesh=mesh, info=_about(config))
    if results is None:
        return
    from lm_eval.utils import handle_non_serializable, make_table

    print_result(make_table(results))  # first: a disk may be full by now
    path = result_path(config.evaluation.eval_results_prefix, datetime.now())
    path = write_new(path, json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False))
    print_result(f"results written to {path}")


def evaluate_model(
    model: Decoder,
    tokenizer: Tokenizer,
    config: Config,
    *,
    tasks: tuple[Sequence[str], Any],
    mesh: Mesh,
    info: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Evaluate a model in eval mode on all documents of the tasks.

    Args:
        model: on the device of `mesh`.
        tokenizer: its tokenizer.
        config: for the batch size.
        tasks: from `find_tasks`.
        mesh: the processes, all of which make this call.
        info: what the results say about the model.

    Returns:
        The harness' results on rank 0 (key "results": task -> metric -> value), None elsewhere.

    Raises:
        UserError: the data of a task are not here and cannot be fetched.
    """
    require_harness()
    from lm_eval import simple_evaluate

    from neox.evaluation.adapter import HarnessModel

    batch_size = config.batch.train_micro_batch_size_per_gpu or 1
    adapter = HarnessModel(model, tokenizer, batch_size=batch_size, mesh=mesh, info=info)
    names, manager = tasks
    with _absent_data_in_one_line():
        results: dict[str, Any] | None = simple_evaluate(
            model=adapter,
            tasks=list(names),
            task_manager=manager,
            batch_size=batch_size,
            device=str(mesh.device),
            log_samples=False,
        )
    say_what_was_changed(adapter)
    return results if mesh.rank == 0 else None


def say_what_was_changed(adapter: "HarnessModel") -> None:
    """Say what was not done as a task asks: contexts cut, settings ignored, text replaced; every process calls this."""
    found = [(adapter.cut, adapter.replaced, adapter.ignored)]
    if adapter.world_size > 1:
        found = adapter.gather_object(found[0]) or []
    if adapter.mesh.rank != 0:
        return
    if cut := sum(count for count, _, _ in found):
        tell(
            f"eval_tasks: {cut:,} requests are longer than the model's {adapter.max_length} positions; "
            "only the end of their contexts was read"
        )
    if ignored := {entry for _, _, entries in found for entry in entries}:
        tell(
            f"eval_tasks: generation_kwargs of a task have {', '.join(sorted(ignored))}, which is not supported here: "
            "its texts were generated without, so its scores do not compare with those of other models"
        )
    if any(replaced for _, replaced, _ in found):
        tell("eval_tasks: some requests had lone surrogates, which UTF-8 cannot hold; each was replaced by U+FFFD")


@contextmanager
def _absent_data_in_one_line() -> Iterator[None]:
    """Tell of data that are not here and cannot be fetched: hosts that compute often reach no network."""
    try:
        yield
    except (ConnectionError, FileNotFoundError) as error:
        what = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"eval_tasks: the data of a task cannot be read ({what}); check its data files, or run it once where the "
            "Hub can be reached, with the same HF_HOME"
        ) from error


def _about(config: Config) -> dict[str, Any]:
    """Collect what the result file should know of the model besides its scores."""
    return {
        "checkpoint": str(open_model(config).folder),
        "precision": config.model.precision,
        "model_parallel_size": config.parallel.model_parallel_size,
        "neox_config": masked_values(config.to_flat()),
    }


def result_path(prefix: str, now: datetime) -> Path:
    """`[{prefix}_]eval_results_MM-DD-YYYY-HH-MM-SS.json`; the prefix may hold a folder."""
    name = f"eval_results_{now:%m-%d-%Y-%H-%M-%S}.json"
    return Path(f"{prefix}_{name}" if prefix else name)
