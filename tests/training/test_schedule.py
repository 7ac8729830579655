"""The learning rate against values that upstream's code produced, and where upstream's were wrong."""

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from neox.errors import CheckpointError, ConfigError
from neox.training.schedule import LRSchedule, learning_rate

DATA = Path(__file__).resolve().parents[1] / "data"
GOLDEN = json.loads((DATA / "lr_schedules.json").read_text())
STYLES = ("constant", "linear", "cosine", "exponential", "inverse_sqrt")


def schedule(style="cosine", *, warmup=10.0, horizon=100, peak=3e-4, minimum=3e-5):
    return LRSchedule(peak=peak, minimum=minimum, style=style, warmup=warmup, horizon=horizon)


def golden_schedule(name):
    style, warmup, total = name.split("|")
    return schedule(style, warmup=float(warmup.partition("=")[2]), horizon=int(total.partition("=")[2]))


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_upstream_values(name):
    expected = golden_schedule(name)
    for step, upstream in enumerate(GOLDEN[name]):
        ours = learning_rate(step, expected)
        if step == 0 and expected.warmup < 1:
            assert upstream == pytest.approx(25 * expected.peak)  # upstream's spike
            assert ours == expected.peak
        elif expected.style == "cosine" and step > expected.horizon:
            assert upstream > expected.minimum  # upstream rises again
            assert ours == expected.minimum
        else:
            assert ours == pytest.approx(upstream, rel=1e-12)


def test_rates_of_a_run_of_upstream():
    # Rates after steps 1 to 5 of a run with lr 1e-3, min_lr 1e-4, cosine, warmup 0.2, lr_decay_iters 10.
    after = [0.0005, 0.001, 0.000965745789630079, 0.0008681980515339464, 0.0007222075445642905]
    run = schedule(warmup=2.0, horizon=10, peak=1e-3, minimum=1e-4)
    assert [run.lr_at(step) for step in range(1, 6)] == pytest.approx(after, rel=1e-12)
    assert run.lr_at(0) == 0.0005  # the first step's


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("warmup", [0.0, 0.04, 0.5, 1.0, 2.5, 10.0, 100.0, 150.0])
@pytest.mark.parametrize("minimum", [0.0, 3e-5, 3e-4])
def test_never_above_the_peak_and_never_rising_after_it(style, warmup, minimum):
    rates = [schedule(style, warmup=warmup, minimum=minimum).lr_at(step) for step in range(400)]
    assert max(rates) <= 3e-4 * (1 + 1e-12)
    assert all(rate > 0 for rate in rates[: min(int(warmup) + 1, 100)])
    after = rates[math.ceil(warmup) :]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(after))
    assert min(after) >= minimum


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_stays_at_the_minimum_after_the_end(style):
    rates = [schedule(style).lr_at(step) for step in range(100, 300)]
    assert rates == [3e-5] * 200


def test_inverse_sqrt_quarters_the_squared_rate():
    decay = schedule("inverse_sqrt", warmup=25.0, minimum=0.0)
    assert decay.lr_at(25) == pytest.approx(3e-4)
    assert decay.lr_at(100) == pytest.approx(1.5e-4)
    assert decay.lr_at(2500) == pytest.approx(3e-5)


def config(**changes):
    section = SimpleNamespace(min_lr=1e-5, lr_decay_style="linear", warmup=0.01, lr_decay_iters=400)
    vars(section).update(changes)
    return SimpleNamespace(optimizer=SimpleNamespace(lr=1e-3), schedule=section)


def test_from_config():
    assert LRSchedule.from_config(config()) == LRSchedule(1e-3, 1e-5, "linear", 4.0, 400)
    with pytest.raises(ConfigError, match="train_iters or lr_decay_iters"):
        LRSchedule.from_config(config(lr_decay_iters=None))


def test_state_is_upstreams():
    run = schedule(warmup=2.0, horizon=10, peak=1e-3, minimum=1e-4)
    # As found in a checkpoint that upstream wrote.
    assert run.state_dict(5) == {
        "start_lr": 0.001,
        "warmup_iter": 2.0,
        "num_iters": 5,
        "decay_style": "cosine",
        "end_iter": 10,
        "min_lr": 0.0001,
    }


def test_reconcile():
    ours, theirs = schedule(), schedule("linear", minimum=1e-6)
    saved = theirs.state_dict(7)
    flags = {"override_lr_scheduler": False, "use_checkpoint_lr_scheduler": False}
    assert ours.reconcile(ours.state_dict(3), **flags) == ours
    assert ours.reconcile(saved, **flags | {"override_lr_scheduler": True}) == ours
    assert ours.reconcile(saved, **flags | {"use_checkpoint_lr_scheduler": True}) == theirs
    with pytest.raises(CheckpointError) as error:
        ours.reconcile(saved, **flags)
    message = str(error.value)
    assert "decay_style is cosine in the config, linear in the checkpoint" in message
    assert "min_lr is 3e-05 in the config, 1e-06 in the checkpoint" in message
    assert "start_lr" not in message
    assert "num_iters" not in message
    assert "\n" not in message


def test_reconcile_refuses_both_choices_and_broken_states():
    with pytest.raises(CheckpointError, match="exclude each other"):
        schedule().reconcile({}, override_lr_scheduler=True, use_checkpoint_lr_scheduler=True)
    with pytest.raises(CheckpointError, match="lacks warmup_iter, decay_style, end_iter, min_lr"):
        schedule().reconcile({"start_lr": 1.0}, override_lr_scheduler=False, use_checkpoint_lr_scheduler=False)
