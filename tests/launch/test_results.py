"""Standard output has results and nothing else, whatever libraries print, and however."""

import errno
import io
import sys
from pathlib import Path

import pytest
from scripts_of import ROOT, fork_script

from neox import results
from neox.errors import OutputError
from neox.launch.main import script_main
from neox.results import HelpParser, print_result

LOUD = f"""
import ctypes, logging, os, subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
early = logging.StreamHandler(sys.stdout)
from neox import results
from neox.launch.local import run_local
from neox.launch.main import leave, script_main

def main(arguments):
    if arguments:
        print("of a worker")
        results.print_result("result of a worker")
        return 0
    results.print_result("one")
    print("plain print")
    sys.stdout.write("written to sys.stdout\\n")
    early.emit(logging.makeLogRecord({{"msg": "a handler made before"}}))
    logging.StreamHandler(sys.stdout).emit(logging.makeLogRecord({{"msg": "a handler made after"}}))
    os.write(1, b"written to the descriptor\\n")
    ctypes.CDLL(None).puts(b"printed by C")
    subprocess.run(["echo", "of a child"], check=True)
    results.print_result("two")
    results.finish()
    return run_local([__file__, "worker"], workers=2, environ=os.environ)

leave(script_main(main))
"""
NOISE = (
    *("plain print", "written to sys.stdout", "a handler made before", "a handler made after"),
    *("written to the descriptor", "printed by C", "of a child", "of a worker"),
)


def test_what_libraries_print_goes_to_standard_error(tmp_path: Path) -> None:
    script = tmp_path / "loud.py"
    script.write_text(LOUD)
    done = fork_script(str(script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["one", "two", "result of a worker", "result of a worker"]
    for text in NOISE:
        assert text in done.stderr


def test_names_that_the_encoding_has_no_bytes_for_are_spelled_out(tmp_path: Path) -> None:
    script = tmp_path / "names.py"
    script.write_text(f"""
import io, sys
sys.path.insert(0, {str(ROOT)!r})
from neox import results
sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding="ascii")
results.claim()
results.print_result("caf\\u00e9 \\udcff")
results.finish()
""")
    assert fork_script(str(script)).stdout == "caf\\xe9 \\udcff\n"


def test_a_program_that_takes_over_has_standard_output(tmp_path: Path) -> None:
    script = tmp_path / "becomes.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from neox import results
results.claim()
results.print_result("before")
results.hand_over()
os.execvp("echo", ["echo", "of the program"])
""")
    assert fork_script(str(script)).stdout.splitlines() == ["before", "of the program"]


class Full(io.StringIO):
    """A stream to a disk without space."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space")


def test_results_that_are_lost_are_one_line_and_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    with results.replaced(Full()):
        with pytest.raises(OutputError, match="standard output"):
            print_result("figures")
        assert script_main(lambda arguments: print_result("figures"), []) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_stand_in_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    stand_in = sys.stdout
    results.claim()
    assert sys.stdout is stand_in
    assert results.stream() is stand_in
    assert results.descriptor() is None
    print_result("a", "b", sep=",", end=";")
    assert capsys.readouterr().out == "a,b;"


def test_help_is_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = io.StringIO()
    with results.replaced(elsewhere), pytest.raises(SystemExit):
        HelpParser(prog="tool").parse_args(["--help"])
    assert elsewhere.getvalue().startswith("usage: tool")
    assert capsys.readouterr() == ("", "")
