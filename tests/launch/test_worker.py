"""Ranks of launchers that leave theirs behind when they are killed."""

import os
import subprocess
import sys

import pytest

RANK = """
import sys, time
from neox.launch.main import script_main

def body(arguments):
    print("up", flush=True)
    time.sleep(60)

sys.exit(script_main(body, []))
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


@pytest.mark.parametrize("mark", ["TORCHELASTIC_RUN_ID", "CROSS_RANK"], ids=["torchrun", "deepspeed"])
def test_ranks_die_with_a_launcher_that_does_not_see_to_it(mark: str) -> None:
    environ = os.environ | {mark: "0"}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK], env=environ, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "up\n"
    launcher.kill()
    launcher.wait()
    # The rank has the other end of the pipe.
    assert launcher.communicate(timeout=30)[0] == ""
