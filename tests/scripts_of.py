"""The scripts of the repository as functions, for tests."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from neox.launch.main import script_main

ROOT = Path(__file__).resolve().parents[1]


def run_script(name: str, *arguments: object) -> int:
    """Run a script, `tools/ckpts/logits.py` say, in this process; return its exit status."""
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[list[str]], int | None] = module.main
    try:
        return script_main(main, [str(word) for word in arguments])
    except SystemExit as error:  # argparse
        return int(error.code or 0)
