"""The scripts of the repository as functions, for tests."""

import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ranks import fork, free_port, kill, rank_variables, wait_for

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


def fork_script(
    name: str, *arguments: object, ranks: int = 0, cwd: Path = ROOT, timeout: float = 240.0, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run `python name arguments...` in a process of its own that has imported torch and DeepSpeed before.

    A script spends most of a test on these imports. Where they matter (what they print, their order), or where the
    script is to start its ranks, which are ordinary processes, a test may start the interpreter instead.

    Args:
        name: path of the script in the repository.
        arguments: words of its command line.
        ranks: start as many of it as a launcher would, each told its rank.
        cwd: folder to run it in.
        timeout: seconds for the whole run.
        environ: variables beside those of this process.
    """
    words = [str(ROOT / name), *map(str, arguments)]
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / "stdout", Path(folder) / "stderr"]
        for stream in streams:
            stream.touch()
        processes = []
        for rank in range(max(ranks, 1)):
            place = rank_variables(rank, ranks, port) if ranks else {}
            variables = {**os.environ, "OMP_NUM_THREADS": "1", **place, **environ}
            processes.append(fork(_as_main, words, str(cwd), variables, [str(stream) for stream in streams]))
        try:
            wait_for(processes, timeout)
            statuses = [process.exitcode for process in processes]
        finally:
            kill(processes)
        texts = [stream.read_text() for stream in streams]
    assert None not in statuses, f"{words}: exit statuses {statuses} after {timeout} s\n{texts[1]}"
    return subprocess.CompletedProcess(words, max(statuses, key=abs), *texts)


def _as_main(words: list[str], cwd: str, environ: dict[str, str], streams: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    for descriptor, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = words
    sys.path[0] = str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")
