"""Which steps are bad; the order of samples without those left out; the file that remembers them."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from neox.checkpoint.native.manifest import Progress
from neox.config.reliability import ReliabilityConfig
from neox.data.loader import RankSampler
from neox.data.order import advance, merged, read_before, read_places
from neox.errors import CheckpointError
from neox.parallel.mesh import Mesh
from neox.training.guards import guard
from neox.training.guards.left_out import LeftOut
from neox.training.guards.rules import Rules

NAN, INF = float("nan"), float("inf")


def rules(scaler: Any = None, **keys: Any) -> Rules:
    return Rules(ReliabilityConfig(**keys), loss_scaler=scaler)


def test_what_is_not_finite() -> None:
    assert not rules().need_every_loss
    assert rules(on_bad_loss="skip").need_every_loss
    judge = rules(on_bad_loss="skip").judge
    assert str(judge(NAN, 1.0)) == "loss nan (on_bad_loss: skip)"
    assert str(judge(-INF, 1.0)) == "loss -inf (on_bad_loss: skip)"
    assert str(judge(2.0, INF)) == "gradient norm inf (on_bad_loss: skip)"
    assert judge(2.0, 1e30) is None


def test_a_norm_above_the_limit() -> None:
    judge = rules(gradient_norm_limit=5.0).judge
    assert judge(2.0, 5.0) is None
    assert str(judge(2.0, 5.1)) == "gradient norm 5.1 above gradient_norm_limit 5 (on_large_gradient: skip)"


def test_a_spike_needs_a_full_window() -> None:
    found = rules(loss_spike_deviations=3.0, loss_spike_window=8)
    for loss in (2.0, 1.0) * 3 + (2.0,):
        found.note(loss)
        assert found.judge(100.0, 1.0) is None
    found.note(1.0)
    assert found.judge(3.0, 1.0) is None  # mean 1.5, deviation 0.5
    finding = found.judge(3.01, 1.0)
    assert finding is not None
    assert (finding.action, finding.key) == ("rewind", "on_loss_spike")
    assert found.judge(-50.0, 1.0) is None
    found.begin([2.0] * 5)
    assert found.judge(100.0, 1.0) is None


def scaler(scale: float, *, dynamic: bool = True, hysteresis: int = 1) -> SimpleNamespace:
    return SimpleNamespace(dynamic=dynamic, cur_scale=scale, min_scale=1.0, delayed_shift=2, cur_hysteresis=hysteresis)


def test_overflow_of_fp16_is_deepspeeds_while_the_scale_can_fall() -> None:
    found = rules(scaler(8.0), on_bad_loss="skip", max_skips=2)
    assert found.need_every_loss
    assert found.judge(2.0, INF) is None
    assert [found.judge(NAN, INF) is None for _ in range(3)] == [True, True, False]
    assert found.judge(2.0, 1.0) is None
    assert found.judge(NAN, INF) is None  # in a row, so counted anew
    assert found.judge(NAN, 1.0) is not None  # the update would be made
    assert rules(scaler(1.0)).judge(2.0, INF) is not None
    assert rules(scaler(1.0, hysteresis=2)).judge(2.0, INF) is None
    fixed = rules(scaler(8.0, dynamic=False))
    assert fixed.judge(2.0, INF) is None
    assert fixed.judge(NAN, INF) is not None


LEFT_OUT = [[3, 5], [9, 20], [21, 22]]


def test_ranges() -> None:
    assert merged([(9, 12), (3, 5), (12, 20), (7, 7), (10, 11), (21, 22)]) == LEFT_OUT
    kept = [place for place in range(60) if not any(start <= place < end for start, end in LEFT_OUT)]
    for start in range(25):
        expected = [place for place in kept if place >= start]
        assert read_before(start, LEFT_OUT) == len(kept) - len(expected)
        assert list(islice(read_places(start, LEFT_OUT), 30)) == expected[:30]
        assert advance(start, 0, LEFT_OUT) == start
        assert [advance(start, n, LEFT_OUT) for n in range(1, 31)] == [place + 1 for place in expected[:30]]


@pytest.mark.parametrize(("size", "micro_batch"), [(1, 1), (1, 3), (2, 2), (4, 1), (3, 5)])
@pytest.mark.parametrize("start", [0, 4, 10])
def test_ranks_share_the_order_without_what_is_left_out(size: int, micro_batch: int, start: int) -> None:
    samplers = [
        RankSampler(40, micro_batch_size=micro_batch, dp_rank=rank, dp_size=size, start=start, left_out=LEFT_OUT)
        for rank in range(size)
    ]
    rounds = islice(zip(*samplers, strict=True), 12)
    read = [number for row in rounds for numbers in row for number in numbers]
    expected = [place % 40 for place in islice(read_places(start, LEFT_OUT), len(read))]
    assert read == expected


def remembered(save: Path | None, data: str = "a", load: Path | None = None) -> LeftOut:
    section = SimpleNamespace(model_dump=lambda **_: data)
    checkpoint = SimpleNamespace(save=save, load=load, finetune=False)
    config: Any = SimpleNamespace(
        data=section,
        comparison=section,
        checkpoint=checkpoint,
        model=SimpleNamespace(seq_length=8),
        training=SimpleNamespace(seed=1),
    )
    return LeftOut(config, Mesh())


def test_the_file_outlives_the_process_and_is_about_one_order_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = remembered(tmp_path)
    assert store.begin(Progress(left_out=[[8, 16]])).left_out == [[8, 16]]
    assert store.add((16, 24), (40, 48)) == [[8, 24], [40, 48]]
    assert remembered(tmp_path).begin(Progress()).left_out == [[8, 24], [40, 48]]
    assert "samples 8 to 23, 40 to 47" in capsys.readouterr().err
    assert remembered(tmp_path / "other", load=tmp_path).begin(Progress()).left_out == [[8, 24], [40, 48]]
    assert remembered(tmp_path, data="b").begin(Progress()).left_out == []
    assert "other data" in capsys.readouterr().err
    assert remembered(None).add((0, 8)) == [[0, 8]]
    (tmp_path / "left_out.json").write_text("[]")
    with pytest.raises(CheckpointError, match="remove it to leave no data out"):
        remembered(tmp_path).begin(Progress())


def test_steps_without_a_labelled_token_say_nothing_of_usual_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "guard_updates", lambda engine, is_left_out: None)
    settings = ReliabilityConfig(loss_spike_deviations=3.0, loss_spike_window=8)
    engine = SimpleNamespace(config=SimpleNamespace(reliability=settings), loss_scale=None, skipped_last_step=False)
    guards = guard.Guards(engine, SimpleNamespace(ranges=[]), SimpleNamespace())  # type: ignore[arg-type]
    before = Progress()
    # The third has a gradient all the same, that of a router's own loss.
    for loss, norm, tokens in ((2.0, 1.0, 8.0), (0.0, 0.0, 0.0), (0.0, 0.1, 0.0), (2.5, 0.0, 4.0)):
        assert not guards._is_left_out(loss, norm)
        after = guards.remember(before, before, torch.tensor(tokens))
    assert after.recent_losses == [2.0, 2.5]
