"""The far end of `neox.launch.ssh`: run a Python program until it ends, or until nobody listens any more.

Standard input brings names of signals, one a line, to be sent to the program. When it ends, so does the program:
SIGTERM, then SIGKILL to its whole group after some seconds.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from neox.launch.worker import LAUNCHER_PID

GRACE_SECONDS = 10.0


def run(argv: Sequence[str]) -> int:
    """Run `python ARGV...` under the watch of standard input; return its exit status, 128 + N for signal N."""
    variables = os.environ | {LAUNCHER_PID: str(os.getpid())}
    process = subprocess.Popen([sys.executable, *argv], stdin=subprocess.DEVNULL, process_group=0, env=variables)
    threading.Thread(target=_obey, args=(process,), daemon=True).start()
    status = process.wait()
    return 128 - status if status < 0 else status


def _obey(process: "subprocess.Popen[bytes]") -> None:
    # Not sys.stdin: the interpreter would wait for its lock at exit.
    with os.fdopen(os.dup(0), "rb", buffering=0) as orders:
        while line := orders.readline():
            process.send_signal(signal.Signals[line.decode().strip()])
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
