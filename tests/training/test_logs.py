"""What ranks print: one stream on the terminal, a file of each rank, and nothing of it may end a run."""

import contextlib
import errno
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from neox.errors import ConfigError, UserError
from neox.launch import reporting
from neox.parallel.mesh import Mesh
from neox.training import team
from neox.training.logs.files import AppendedFile, NoteStep, RankFile
from neox.training.logs.once import Once
from neox.training.logs.output import logged_output

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank %s step %s \| (.*)"


def settings(*, log_dir: Path | None = None, save: Path | None = None, size: int = 2**20, count: int = 2):
    return SimpleNamespace(
        logging=SimpleNamespace(log_dir=log_dir and str(log_dir), log_file_size=size, log_file_count=count),
        checkpoint=SimpleNamespace(save=save and str(save)),
    )


def texts(path: Path, rank: int = 0, step: object = "-") -> list[str]:
    """The lines of a rank's file without what stands before each."""
    matches = [re.fullmatch(LINE % (rank, step), line) for line in path.read_text().splitlines()]
    assert all(matches), path.read_text()
    return [match[1] for match in matches if match]


def speak(folder: str, terminal: str) -> None:
    """Print as libraries and the project do, with the terminal in a file."""
    rank = os.environ["RANK"]
    torch.distributed.init_process_group("gloo")
    descriptor = os.open(terminal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    library = logging.getLogger("library")
    library.addHandler(logging.StreamHandler(sys.stdout))
    with logged_output(settings(save=Path(folder))):
        print(f"figures of rank {rank}")
        library.warning("bound early in rank %s", rank)
        for number in range(3):
            warnings.warn(f"old function, {number}", stacklevel=1)
        logging.getLogger("neox.x").warning("disk of rank %s fails", rank)
        sys.stderr.write(f"report of {rank}:\n  all its\n  lines\n")  # as the watch does: print() would write twice
        if rank != "0":
            print(f"only {'x' * int(rank)} says this", file=sys.stderr)
        NoteStep().before_training(SimpleNamespace(iteration=120))
        print("later")
        torch.distributed.barrier()  # the first to leave forgets what was said


def test_one_stream_from_rank_0_and_a_file_of_each(tmp_path: Path) -> None:
    terminal = tmp_path / "terminal"
    run_ranks(speak, 3, str(tmp_path / "save"), str(terminal))
    lines = terminal.read_text().splitlines()
    for text in ("figures of rank 0", "bound early in rank 0", "later"):  # standard output: of the first rank alone
        assert lines.count(text) == 1
    assert not [line for line in lines if "figures of rank" in line and line != "figures of rank 0"]
    # standard error: once, or twice where another rank was faster than the first
    for pattern, of_rank_0 in ((r"disk of rank \d fails", 1), (r"report of \d:", 1), (r"\S+ UserWarning: old .*", 3)):
        assert len([line for line in lines if re.fullmatch(pattern, line)]) == of_rank_0
        assert len([line for line in lines if re.fullmatch(rf"\[rank \d\] {pattern}", line)]) <= 1
    assert {"[rank 1] only x says this", "[rank 2] only xx says this"} <= set(lines)
    for index in [i for i, line in enumerate(lines) if "report of" in line]:
        mark = lines[index].partition("report")[0]
        assert lines[index + 1 : index + 3] == [f"{mark}  all its", f"{mark}  lines"]
    for rank in range(3):
        written = (tmp_path / "save" / "logs" / "ranks" / f"rank-{rank:05d}.log").read_text().splitlines()
        assert re.fullmatch(LINE % (rank, 120), written[-1])
        before = "\n".join(re.fullmatch(LINE % (rank, "-"), line)[1] for line in written[:-1])
        assert re.match(rf"started: rank {rank} of 3 on \S+, process \d+\nfigures of rank {rank}\n", before)
        for text in (
            "bound early in",
            "old function, 2",
            f"disk of rank {rank} fails",
            f"report of {rank}:\n  all its",
        ):
            assert text in before


def test_upstreams_two_files_of_a_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def crash() -> None:
        with logged_output(settings(log_dir=tmp_path)):
            print("before")
            raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError):
        crash()
    (out,), (error,) = tmp_path.glob("*_stdout.txt"), tmp_path.glob("*_stderr.txt")
    assert out.read_text(encoding="utf-8") == capsys.readouterr().out == "before\n"
    assert "ZeroDivisionError: here" in error.read_text(encoding="utf-8")
    own = texts(tmp_path / "ranks" / "rank-00000.log", step="(?:-|120)")
    assert own[1:3] == ["before", "Traceback (most recent call last):"]
    assert own[-1] == "ZeroDivisionError: here"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="change log_dir"), logged_output(settings(log_dir=tmp_path / "file")):
        pass


def test_a_mistake_is_one_line_and_no_folder_means_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sys.stdout
    with logged_output(settings()), logged_output(settings(save=tmp_path, size=0)):
        assert sys.stdout is before
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError), logged_output(settings(save=tmp_path)):
        raise UserError("iteration 3: no data")
    assert texts(tmp_path / "logs" / "ranks" / "rank-00000.log", step="(?:-|120)")[1:] == ["iteration 3: no data"]
    assert sys.stdout is before


def file_of(path: Path, tell=print, **limits: int) -> RankFile:
    return RankFile(AppendedFile(path, tell, **limits), rank=7)


def test_rotation(tmp_path: Path) -> None:
    file = file_of(tmp_path / "x.log", most_bytes=500, earlier=2)
    for number in range(40):
        file.write(f"number {number} ")
        file.write("of many\nand half")
        file.write(" a line\n")
    file.write("unfinished")
    file.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.log", "x.log.1", "x.log.2"]
    assert all(0 < path.stat().st_size <= 500 for path in tmp_path.iterdir())
    kept = [text for name in ("x.log.2", "x.log.1", "x.log") for text in texts(tmp_path / name, 7, r"\S+")]
    everything = [text for number in range(40) for text in (f"number {number} of many", "and half a line")]
    assert kept == [*everything, "unfinished"][-len(kept) :]
    assert len(kept) > 15


def test_rotation_that_keeps_no_earlier_file(tmp_path: Path) -> None:
    file = file_of(tmp_path / "x.log", most_bytes=200, earlier=0)
    for number in range(40):
        file.write(f"number {number}\n")
    file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["x.log"]
    assert (tmp_path / "x.log").stat().st_size <= 200
    assert texts(tmp_path / "x.log", 7, r"\S+")[-1] == "number 39"


def test_what_is_printed_after_the_reader_has_gone_is_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(text: str) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=gone, flush=lambda: None))
    with logged_output(settings(save=tmp_path), {}):
        print("iteration 3", file=sys.stderr, flush=True)
    assert "iteration 3" in texts(tmp_path / "logs" / "ranks" / "rank-00000.log")


def test_lines_that_nobody_reads_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        team.tell(Mesh(device=torch.device("cpu")), "saved")
        reporting.tell("restart 1 of 3")
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            gone.close()  # flushes what it still holds


def test_a_line_drawn_over_is_what_it_came_to(tmp_path: Path) -> None:
    file = file_of(tmp_path / "x.log")
    file.write("10%\r20%\r100%\r\n")
    file.close()
    assert texts(tmp_path / "x.log", 7, r"\S+") == ["100%"]


def test_a_disk_that_is_full_loses_lines_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    file, write, full = file_of(tmp_path / "x.log", said.append), os.write, True

    def fail(descriptor: int, data: bytes) -> int:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", fail)
    file.write("a\nb\nc\n")
    full = False
    file.write("d\ne\n")
    assert texts(tmp_path / "x.log", 7, r"\S+") == ["d", "e"]
    assert [text.partition("x.log: ")[2] for text in said] == [
        f"cannot be written ({os.strerror(errno.ENOSPC)}); its lines are lost until it can\n",
        "can be written again\n",
    ]


def test_a_line_that_a_full_disk_cut_off_is_ended_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    file, write, room = AppendedFile(tmp_path / "x.log", said.append), os.write, 8

    def fill(descriptor: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(descriptor, data[:room])
        room -= done
        return done

    monkeypatch.setattr(os, "write", fill)
    for line in ("first\n", "second\n", "third\n"):
        file.append(line)
    room = 100
    file.append("fourth\n")
    file.append("fifth\n")
    assert (tmp_path / "x.log").read_text() == "first\nse\nfourth\nfifth\n"
    assert len(said) == 2


def test_a_forked_worker_appends_and_renames_nothing(tmp_path: Path) -> None:
    file = file_of(tmp_path / "x.log", most_bytes=200, earlier=2)
    child = os.fork()
    if child == 0:
        file.write("from the worker\n" * 20)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.log"]
    file.write("from the rank\n")
    assert texts(tmp_path / "x.log.1", 7, r"\S+") == ["from the worker"] * 20
    assert texts(tmp_path / "x.log", 7, r"\S+") == ["from the rank"]


def test_a_signal_handler_may_print_in_the_middle_of_a_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = file_of(tmp_path / "x.log"), os.write

    def interrupted(descriptor: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", write)
        signal.raise_signal(signal.SIGUSR1)
        return write(descriptor, data)

    before = signal.signal(signal.SIGUSR1, lambda *_: file.write("from the handler\n"))
    monkeypatch.setattr(os, "write", interrupted)
    try:
        file.write("from the run\n")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sorted(texts(tmp_path / "x.log", 7, r"\S+")) == ["from the handler", "from the run"]


def test_once_is_until_it_is_news_again(tmp_path: Path) -> None:
    now = [600.0 * 10**6 - 0.1]  # just before a period ends
    first, second = (Once(tmp_path / "said", clock=lambda: now[0]) for _ in range(2))
    assert first.is_first("rank 1 is slow, 3.5 s")
    now[0] += 0.2
    assert not second.is_first("rank 12 is slow, 2.25 s")
    assert second.is_first("rank 12 is fast")
    now[0] += 3600
    assert second.is_first("rank 2 is slow, 1.0 s")
    assert len(list((tmp_path / "said").iterdir())) == 1
    first.forget()
    assert not (tmp_path / "said").exists()
    (tmp_path / "said").write_text("no folder")
    assert first.is_first("x")
    assert second.is_first("x")


CRASH = """
import os, sys
from types import SimpleNamespace
from neox.training.logs.output import logged_output
config = SimpleNamespace(logging=SimpleNamespace(log_dir=None, log_file_size=1, log_file_count=1),
                         checkpoint=SimpleNamespace(save=sys.argv[1]))
def dies():
    import ctypes
    ctypes.string_at(0)
with logged_output(config):
    if len(sys.argv) > 2:
        dies()
"""


def test_the_stack_of_a_fatal_signal_is_in_a_file(tmp_path: Path) -> None:
    fatal = tmp_path / "logs" / "ranks" / "rank-00000.fatal.txt"
    quiet = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], check=False)
    assert (quiet.returncode, fatal.exists()) == (0, False)
    died = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path), "crash"], capture_output=True, check=False)
    assert died.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in fatal.read_text()
    assert "in dies" in fatal.read_text()


KILLED = """
import os, sys
from types import SimpleNamespace
from neox.training.logs.output import logged_output
config = SimpleNamespace(logging=SimpleNamespace(log_dir=None, log_file_size=1, log_file_count=1),
                         checkpoint=SimpleNamespace(save=sys.argv[1]))
with logged_output(config):
    print("rank 0 is lost", file=sys.stderr, flush=True)
    os._exit(3)
"""


def test_what_a_killed_run_said_the_next_one_on_its_port_says_too(tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(tmp_path)]
    environ = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29999", "TMPDIR": str(tmp_path)}
    for _ in range(2):
        # A launcher of its own, for which the shell stands.
        done = subprocess.run(
            ["sh", "-c", '"$@"; exit $?', "sh", *words], env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 3
        assert done.stderr == "[rank 1] rank 0 is lost\n"
