"""The one place that imports lm-evaluation-harness (package `lm_eval`)."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import neox
from neox.errors import UserError


def require_harness() -> ModuleType:
    """Import lm-evaluation-harness.

    Raises:
        UserError: it is not installed.
    """
    try:
        _import_metrics()
        return import_module("lm_eval")
    except ImportError as error:
        raise UserError(
            f'eval_tasks: lm-evaluation-harness cannot be imported ({error}); pip install "neox[eval]"'
        ) from None


def _import_metrics() -> None:
    """Import Hugging Face's `evaluate` under its name.

    The harness imports it by that name later on, and a Python started from the project's folder would find the
    script evaluate.py there instead.
    """
    project = Path(neox.__file__).resolve().parent.parent
    loaded = sys.modules.get("evaluate")
    if loaded is not None and Path(loaded.__file__ or "").resolve().parent == project:
        del sys.modules["evaluate"]
    path = sys.path
    sys.path = [entry for entry in path if Path(entry or ".").resolve() != project]
    try:
        import_module("evaluate")
    finally:
        sys.path = path
