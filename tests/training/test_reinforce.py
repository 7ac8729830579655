"""REINFORCE on the completions of a server."""

import errno
import json
import os
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training.preferences import MODEL, VOCABULARY, trained

from neox.data.online import OnlineDataset, ask
from neox.errors import DataError


class Server(socketserver.ThreadingTCPServer):
    """Answers each line with the next of its answers, the last one again and again."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, *answers: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = list(answers)
        self.asked: list[bytes] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class Handler(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        self.server.asked.append(self.rfile.readline())
        answers = self.server.answers
        self.wfile.write(answers.pop(0) if len(answers) > 1 else answers[0])


def serving(*answers: Any) -> Server:
    """A server of these answers, as JSON unless they are bytes."""
    lines = [answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n" for answer in answers]
    server = Server(*lines)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def samples(seed: int) -> list[dict[str, Any]]:
    """Four prompts with two completions each, the better one of lower tokens."""
    drawn = np.random.RandomState(seed)
    return [
        {
            "prefix": drawn.randint(0, VOCABULARY, 3).tolist(),
            "completions": [drawn.randint(low, low + 30, 8).tolist() for low in (0, 30)],
            "rewards": [1.0, 0.0],
        }
        for _ in range(4)
    ]


@pytest.fixture
def server() -> Iterator[Server]:
    found = serving(samples(1))
    yield found
    found.shutdown()
    found.server_close()


def settings(server: Server, **changes: Any) -> dict[str, Any]:
    flat = MODEL | {"train_impl": "reinforce", "dataset_impl": "online", "checkpoint_factor": 100}
    return flat | {"online_dataserver_ips": "127.0.0.1", "online_dataserver_ports": server.port} | changes


@pytest.mark.parametrize("kl_impl", ["abs", "mse", "kl", "full"])
def test_what_is_rewarded_becomes_likelier(server: Server, tmp_path: Path, kl_impl: str) -> None:
    flat = settings(server, kl_impl=kl_impl, reinforce_leave_one_out=True, save=str(tmp_path))
    steps = trained(flat | {"eval_iters": 1, "eval_interval": 6}, 1)
    first, last = steps[0], steps[-1]
    # Advantages are 1 and -1, all completions of one length: at first the loss is the gap of log-probabilities.
    assert first["train/kl"] == 0.0
    assert first["train/ref_logp"] == pytest.approx(first["train/logp"], rel=1e-6)
    assert (first["train/reward"], first["train/reward_std"]) == (0.5, 0.5)
    assert last["train/lm_loss"] < first["train/lm_loss"] - 0.05
    assert last["train/kl"] != 0.0
    assert last["validation/lm_loss"] < first["train/lm_loss"]
    assert set(server.asked) == {b'"train"\n', b'"valid"\n', b'"test"\n'}


def test_a_layout_changes_nothing(tmp_path: Path) -> None:
    """Two data ranks ask a server each, for what one process gets by turns."""
    first, second = samples(1)[:2], samples(2)[:2]
    by_turns = [serving(*[first, second] * 6) for _ in range(2)]
    each = [serving(first).port, serving(second).port]
    changes = {"reinforce_leave_one_out": True}
    expected = trained(settings(by_turns[0], save=str(tmp_path / "one"), **changes), 1)
    tensor = trained(settings(by_turns[1], save=str(tmp_path / "tp"), model_parallel_size=2, **changes), 2)
    changes |= {"online_dataserver_ports": each, "zero_optimization": {"stage": 3}}
    data = trained(settings(by_turns[0], save=str(tmp_path / "dp"), **changes), 2)
    for found in (tensor, data):
        for step, wanted in zip(found, expected, strict=True):
            assert step == {name: pytest.approx(value, rel=2e-4, abs=2e-5) for name, value in wanted.items()}


def test_without_divergence_no_reference_runs(server: Server, tmp_path: Path) -> None:
    first = trained(settings(server, kl_div_beta=0, reference_load="nowhere", exit_interval=1, save=str(tmp_path)), 1)[
        0
    ]
    assert "train/kl" not in first
    assert "train/ref_logp" not in first


def dataset(server: Server, **changes: Any) -> OnlineDataset:
    options = {"seq_length": 6, "vocabulary": 10, "leaves_one_out": False} | changes
    return OnlineDataset(("127.0.0.1", server.port), "train", **options)


def test_rows() -> None:
    sample = {"prefix": [1, 2], "completions": [[3, 4], [5, 6, 7, 8, 9, 9]], "rewards": [2, 5.0]}
    short, long = dataset(serving([sample]), leaves_one_out=True).take(2)
    assert short["tokens"].tolist() == [1, 2, 3, 4, 0, 0, 0]
    assert short["labels"].tolist() == [-100, -100, 3, 4, -100, -100, -100]
    assert long["tokens"].tolist() == [1, 2, 5, 6, 7, 8, 9]
    assert [float(row["rewards"]) for row in (short, long)] == [-3.0, 3.0]
    assert [float(row["raw_rewards"]) for row in (short, long)] == [2.0, 5.0]


def test_the_moving_baseline_is_that_of_the_prompts_before() -> None:
    def prompt(*rewards: float) -> dict[str, Any]:
        return {"prefix": [1], "completions": [[2]] * len(rewards), "rewards": rewards}

    source = dataset(serving([prompt(1.0, 3.0), prompt(6.0)], [prompt(5.0)]))
    assert [float(row["rewards"]) for row in source.take(4)] == [1.0, 3.0, 4.0, 1.0]
    for _ in range(200):
        last = source.take(1)[0]
    assert float(last["rewards"]) == 0.0  # the first two are forgotten


GOOD = {"prefix": [1], "completions": [[2]], "rewards": [1.0]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "expected one line of JSON, got b''"),
        (b"\x80\x04]\x94.\n", "expected one line of JSON"),
        (b"[" * 100_000 + b"]" * 100_000 + b"\n", "expected one line of JSON"),
        ({"a": 1}, "expected a list of samples"),
        ([], "expected a list of samples"),
        ([GOOD, 7], "sample 1: expected prefix, completions and rewards, got 7"),
        ([GOOD | {"rewards": [1.0, 2.0]}], "sample 0: expected as many rewards as completions"),
        ([GOOD | {"completions": [[10]]}], r"sample 0: expected lists of token ids from 0 to 9, got \[10\]"),
        ([GOOD | {"completions": [[True]]}], "sample 0: expected lists of token ids"),
        ([GOOD | {"completions": [[]]}], "sample 0: a completion is empty"),
        ([GOOD | {"rewards": [float("nan")]}], "sample 0: expected finite numbers for rewards"),
        ([GOOD | {"rewards": [10**400]}], "sample 0: expected finite numbers for rewards"),
        ([GOOD | {"prefix": [1] * 7}], "a prompt of 7 tokens leaves no room for a completion in seq_length 6"),
    ],
)
def test_bad_answers(answer: Any, message: str) -> None:
    server = serving(answer)
    with pytest.raises(DataError, match=message) as error:
        dataset(server).take(1)
    assert str(error.value).startswith(f"server of completions 127.0.0.1:{server.port}: ")
    assert "\n" not in str(error.value)


def test_a_single_completion_has_no_others() -> None:
    with pytest.raises(DataError, match="reinforce_leave_one_out compares the completions of a prompt"):
        dataset(serving([GOOD]), leaves_one_out=True).take(1)


def test_no_server() -> None:
    with pytest.raises(DataError, match=f"{os.strerror(errno.ECONNREFUSED)}; start it, or mend online_dataserver_ips"):
        ask("127.0.0.1", 9, "train", 10)


def test_the_server_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    program = page.partition("```python\n")[2].partition("```")[0]
    started: list[socketserver.TCPServer] = []
    monkeypatch.setattr(socketserver.BaseServer, "serve_forever", lambda server, *_: started.append(server))
    exec(program.replace('("localhost", 10000)', '("127.0.0.1", 0)'), {"__name__": "example"})
    monkeypatch.undo()
    threading.Thread(target=started[0].serve_forever, daemon=True).start()
    prompts = ask("127.0.0.1", int(started[0].server_address[1]), "train", 100)
    assert [(len(p.prefix), len(p.completions), len(p.rewards)) for p in prompts] == [(5, 4, 4)] * 8
    started[0].shutdown()
    started[0].server_close()
