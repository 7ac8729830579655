"""The check of hosts: what a host says of itself, and what the answers mean together."""

import copy
import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training.layouts import ADAMW, MODEL, TRAINING

from neox.config import config_from_dict, named_datasets
from neox.launch import conversation, probe
from neox.launch.preflight import check_hosts, checkpoint_bytes, print_table
from neox.launch.probe import ANSWER, GPU_FIELDS, data_files, gpus, look, look_again, tidy, write_rate
from neox.launch.verdict import Row, is_go, judge, judge_links

ROOT = Path(__file__).resolve().parents[2]
POOL = {"n1": (0, 1), "n2": (0, 1), "n3": (0, 1)}
GPU = {
    "name": "NVIDIA H100",
    "memory_MiB": "81559",
    "used_MiB": "4",
    "driver": "570.1",
    "temperature": "40",
    "uncorrected_errors": "0",
    "rows_to_remap": "No",
}
ANSWER_OF_ONE = {
    "software": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "neox source": "0123"},
    "commit": "abc",
    "gpus": [GPU, GPU],
    "save": {"free": 10**12, "rate": 2e9},
    "marks": ["n1", "n2", "n3"],
    "data": {"/data/pile": {"bin": 10**9, "idx": "77"}},
    "time": 1000.0,
}
WINDOW = (999.5, 1000.5)


def verdict(*, silent: dict[str, str] | None = None, size: int = 0, **changes: Any) -> dict[str, Row]:
    """Rows by name when n2's answer is changed; a key `a.b` goes into a mapping."""
    answers = {host: copy.deepcopy(ANSWER_OF_ONE) for host in POOL if host not in (silent or {})}
    for name, value in changes.items():
        answers["n2"][name] = value
    return {row.name: row for row in judge(answers, silent or {}, POOL, WINDOW, checkpoint_bytes=size)}


def test_all_is_well() -> None:
    rows = verdict()
    assert {row.state for row in rows.values()} == {"ok"}
    assert list(rows) == [
        "hosts answer",
        "code and packages",
        "GPUs",
        "GPUs' state",
        "clocks",
        "checkpoint folder",
        "write rate",
        "data pile",
    ]
    assert rows["GPUs"].detail == "6 x NVIDIA H100 81559 MiB"
    assert rows["write rate"].detail == "6.00 GB/s, all hosts together"


@pytest.mark.parametrize(
    ("changes", "name", "state", "words"),
    [
        (
            {"software": ANSWER_OF_ONE["software"] | {"torch": "2.11.0"}},  # type: ignore[operator]
            "code and packages",
            "fail",
            "torch: 2.13.0 on n1, n3; 2.11.0 on n2",
        ),
        ({"gpus": [GPU]}, "GPUs", "fail", "n2 has 1 for 2 slots"),
        ({"gpus": [GPU, GPU | {"name": "A100"}]}, "GPUs", "fail", "A100 81559 MiB on n2"),
        ({"gpus": [GPU, GPU | {"uncorrected_errors": "3"}]}, "GPUs", "fail", "n2 GPU 1: 3 uncorrected memory errors"),
        ({"gpus": [GPU | {"rows_to_remap": "Yes"}, GPU]}, "GPUs", "fail", "n2 GPU 0: memory rows wait"),
        ({"gpus": {"error": "nvidia-smi: no driver"}}, "GPUs", "fail", "n2: nvidia-smi: no driver"),
        ({"gpus": [GPU, GPU | {"temperature": "91"}]}, "GPUs' state", "warn", "n2 GPU 1: 91 degrees"),
        ({"gpus": [GPU, GPU | {"used_MiB": "30000"}]}, "GPUs' state", "warn", "another program has 30000 MiB"),
        ({"gpus": [GPU | {"driver": "560.2"}] * 2}, "GPUs' state", "warn", "driver: 570.1 on n1, n3; 560.2 on n2"),
        ({"time": 1010.0}, "clocks", "fail", "n2 is off by 9.5 s or more"),
        ({"time": 990.0}, "clocks", "fail", "n2 is off by 9.5 s or more"),
        ({"save": {"error": "/ckpt: read-only"}}, "checkpoint folder", "fail", "n2: /ckpt: read-only"),
        ({"marks": ["n2"]}, "checkpoint folder", "fail", "n2 does not see what n1, n3 wrote"),
        ({"save": {"free": 10**9, "rate": 2e9}, "size": 10**9}, "checkpoint folder", "fail", "take about 2.0 GB"),
        ({"save": {"free": 10**12, "rate": 1e8}}, "write rate", "warn", "n2: 0.10 GB/s, where the median is 2.00"),
        ({"data": {"/data/pile": {"error": "no such file"}}}, "data pile", "fail", "n2: no such file"),
        ({"data": {"/data/pile": {"bin": 10**9, "idx": "78"}}}, "data pile", "fail", "idx: 77 on n1, n3; 78 on n2"),
        ({"data": {"/data/pile": {"bin": 5, "idx": "77"}}}, "data pile", "fail", "bin: 1000000000 on n1, n3; 5 on n2"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_what_is_wrong_is_named(changes: dict[str, Any], name: str, state: str, words: str) -> None:
    rows = verdict(**changes)
    assert rows[name].state == state
    assert words in rows[name].detail
    assert {row.name for row in rows.values() if row.state == "fail"} == ({name} if state == "fail" else set())
    assert is_go(rows.values()) == (state != "fail")


def test_a_silent_host() -> None:
    rows = verdict(silent={"n1": "no route", "n3": "no route"})
    assert (rows["hosts answer"].state, rows["hosts answer"].detail) == ("fail", "n1, n3: no route")
    assert not is_go(judge({}, dict.fromkeys(POOL, "no route"), POOL, WINDOW))


def test_no_gpus_and_no_configuration_are_remarked() -> None:
    answers = {host: ANSWER_OF_ONE | {"gpus": [], "save": None, "data": {}} for host in POOL}
    rows = {row.name: row.state for row in judge(answers, {}, POOL, WINDOW)}
    assert (rows["GPUs"], rows["checkpoint folder"]) == ("warn", "warn")


def links(**rates: float) -> dict[str, Any]:
    pairs = {"ab": ("n1", "n2"), "ac": ("n1", "n3"), "bc": ("n2", "n3")}
    found = [[*pairs[name], 0, rate] for name, rate in rates.items()]
    return {"library": "nccl", "reduce": {"right": True, "rate": 4e10}, "links": found}


def test_links() -> None:
    reduce, all_links = judge_links(links(ab=2e10, ac=2.1e10, bc=1.9e10), {})
    assert (reduce.state, reduce.detail) == ("ok", "right; 40.00 GB/s over nccl")
    assert (all_links.state, all_links.detail) == ("ok", "3 measured; slowest n2 - n3: 19.00 GB/s")


def test_a_slow_link_is_named() -> None:
    row = judge_links(links(ab=2e10, ac=2e10, bc=5e9), {})[1]
    assert (row.state, row.detail) == ("fail", "n2 - n3: 5.00 GB/s, where the median is 20.00")


def test_a_link_that_changes_messages_is_named() -> None:
    row = judge_links(links(ab=2e10, ac=2e10, bc=0), {})[1]
    assert row.state == "fail"
    assert "n2 - n3: messages arrive changed" in row.detail


def test_a_wrong_sum_and_no_end() -> None:
    wrong = links(ab=2e10) | {"reduce": {"right": False, "rate": 4e10}}
    assert judge_links(wrong, {})[0].state == "fail"
    (row,) = judge_links(None, {"n1": "they do not meet", "n2": "they do not meet"})
    assert (row.state, row.detail) == ("fail", "they do not meet")


def test_a_host_looks_at_itself(tmp_path: Path) -> None:
    (tmp_path / "pile.idx").write_bytes(b"lengths")
    (tmp_path / "pile.bin").write_bytes(b"tokens")
    save = tmp_path / "new" / "folder"
    request = {"save": str(save), "mark": "n1", "write_mb": 1, "data": [str(tmp_path / "pile"), str(tmp_path / "no")]}
    answer = look(request)
    assert answer["save"]["free"] > 0
    assert answer["save"]["rate"] > 0
    checksum = hashlib.sha256(b"lengths").hexdigest()[:16]
    assert answer["data"][str(tmp_path / "pile")] == {"bin": 6, "idx": checksum}
    assert answer["data"][str(tmp_path / "no")] == {"error": f"{tmp_path}/no.idx: no such file or directory"}
    assert answer["software"]["torch"] != "missing"
    assert look_again(request) == {"marks": ["n1"]}
    tidy(request)
    assert look_again(request) == {"marks": []}
    assert list(save.iterdir()) == []


def test_checksum_of_the_index(tmp_path: Path) -> None:
    for name, content in (("a", b"lengths"), ("b", b"lengths"), ("c", b"lengthz")):
        (tmp_path / f"{name}.idx").write_bytes(content)
        (tmp_path / f"{name}.bin").write_bytes(b"")
    found = {name: data_files(str(tmp_path / name)) for name in "abc"}
    assert found["a"] == found["b"]
    assert found["a"]["idx"] != found["c"]["idx"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    request = {"save": str(tmp_path / "file" / "save"), "mark": "n1", "write_mb": 1, "data": []}
    assert "not a directory" in look(request)["save"]["error"]
    assert write_rate(tmp_path, 1 << 20) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, size: int) -> float:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as of a write, which knows no name

    monkeypatch.setattr(probe, "write_rate", full)
    answer = look({"mark": "n1", "save": str(tmp_path), "write_mb": 1, "data": []})
    assert answer["save"] == {"error": f"{tmp_path}: no space left on device"}


def test_gpus_as_nvidia_smi_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []
    fake.write_text('#!/bin/sh\necho "NVIDIA H100 80GB HBM3, 81559, 4, 570.1, 33, 0, No"\n')
    fake.chmod(0o755)
    (found,) = gpus()
    words = ["NVIDIA H100 80GB HBM3", "81559", "4", "570.1", "33", "0", "No"]
    assert found == dict(zip(GPU_FIELDS, words, strict=True))
    fake.write_text('#!/bin/sh\necho "Unable to determine the device handle"\nexit 15\n')
    with pytest.raises(ValueError, match="nvidia-smi: Unable to determine"):
        gpus()


def test_the_probe_is_a_program(tmp_path: Path) -> None:
    request = json.dumps({"step": "look", "save": None, "mark": "n1", "write_mb": 1, "data": []})
    command = [sys.executable, "-m", "neox.launch.probe", request]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    assert json.loads(done.stdout.removeprefix(ANSWER))["save"] is None


def test_what_the_configuration_says() -> None:
    config = config_from_dict(MODEL | TRAINING | ADAMW | {"data_path": "a"})
    assert list(named_datasets(config).values()) == ["a"]
    # 2 layers of 64, 131 tokens.
    assert checkpoint_bytes(config) == 14 * (12 * 2 * 64**2 + 2 * 131 * 64)


def test_the_table_names_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([Row("clocks", "ok", "within 1 s"), Row("links", "fail", "n1 - n2 [slow]")], hosts=2)
    said = capsys.readouterr().err
    assert "2 hosts: no go" in said
    assert "n1 - n2 [slow]" in said


def test_two_hosts_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are this machine, by a stand-in for ssh; then one of them is gone."""
    fake = tmp_path / "ssh"
    fake.write_text('#!/bin/sh\n[ "$1" != gone ] || { echo "no route" >&2; exit 255; }\nshift\nexec sh -c "$*"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(conversation, "SSH", (str(fake),))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    assert check_hosts(tmp_path / "hosts", None, write_mb=1, message_mb=1)
    said = capsys.readouterr().err
    assert "2 hosts: go" in said
    assert "1 measured; slowest n1 - n2" in said
    (tmp_path / "hosts").write_text("n1 slots=1\ngone slots=1\n")
    assert not check_hosts(tmp_path / "hosts", None, write_mb=1, message_mb=1)
    assert "gone: no route" in capsys.readouterr().err
