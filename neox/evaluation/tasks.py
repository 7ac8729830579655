"""Which tasks `eval_tasks` means: names of lm-evaluation-harness, patterns, and local YAML files and folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neox.config.problems import did_you_mean
from neox.errors import UserError
from neox.evaluation.harness import require_harness

_YAML = (".yaml", ".yml")


def find_tasks(asked: Sequence[str]) -> tuple[list[str], Any]:
    """Resolve the entries of `eval_tasks`.

    Args:
        asked: names of tasks, groups or tags; patterns such as `mmlu_*`; paths of task YAML files; folders of such
            files, whose tasks can then be named too. A folder alone, with no name beside it, means all its tasks.

    Returns:
        Names and paths for the harness, and its `TaskManager` that knows them.

    Raises:
        UserError: nothing is asked for, a name is unknown, or a folder holds no task.
    """
    if not asked:
        raise UserError("eval_tasks: none given; name some, as in --eval_tasks lambada_openai piqa")
    require_harness()
    from lm_eval.tasks import TaskManager

    folders = [Path(entry) for entry in asked if Path(entry).is_dir()]
    files = [entry for entry in asked if Path(entry).suffix in _YAML]
    names = [entry for entry in asked if entry not in files and not Path(entry).is_dir()]
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"eval_tasks: {path}: no such file; check the path")
    # Reading the harness' own thousands of files takes seconds, and a local task needs none of them.
    manager = TaskManager(include_path=folders, include_defaults=bool(names))
    found = [match for name in names for match in _matches(name, manager)]
    if folders and not names:
        found = _all_of(folders, TaskManager)
    elif folders:
        _check_named(folders, found, TaskManager)
    return [*found, *files], manager


def _matches(name: str, manager: Any) -> list[str]:
    matches: list[str] = manager.match_tasks([name])
    if not matches:
        near = did_you_mean(name, manager.all_tasks)
        raise UserError(f"eval_tasks: {name!r} is no task of lm-evaluation-harness{near or '; check the name'}")
    return matches


def _all_of(folders: list[Path], manager_class: Any) -> list[str]:
    return [task for folder in folders for task in _manager_of(folder, manager_class).all_subtasks]


def _check_named(folders: list[Path], found: list[str], manager_class: Any) -> None:
    """See that a task of each folder is among those that are named: nothing else of it would be run."""
    for folder in folders:
        tasks = _manager_of(folder, manager_class).all_tasks
        if not set(tasks) & set(found):
            raise UserError(
                f"eval_tasks: {folder}: none of its tasks is named beside it; add {tasks[0]} say, or name no others"
            )


def _manager_of(folder: Path, manager_class: Any) -> Any:
    manager = manager_class(include_path=folder, include_defaults=False)
    if not manager.all_subtasks:
        raise UserError(f"eval_tasks: {folder}: holds no task; it needs a YAML file with a `task:` key")
    return manager
