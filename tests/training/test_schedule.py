"""The learning rate against values that upstream's code produced, and where upstream's were wrong."""

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from neox.config import config_from_dict
from neox.config.learning_rate import learning_rate
from neox.errors import CheckpointError, ConfigError
from neox.training.schedule import LRSchedule

DATA = Path(__file__).resolve().parents[1] / "data"
GOLDEN = json.loads((DATA / "lr_schedules.json").read_text())
STYLES = ("constant", "linear", "cosine", "exponential", "inverse_sqrt", "wsd")


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


@pytest.mark.parametrize("style", ["linear", "cosine", "wsd"])
def test_stays_at_the_minimum_after_the_end(style):
    rates = [schedule(style).lr_at(step) for step in range(100, 300)]
    assert rates == [3e-5] * 200


# With peak 1, minimum 0.1, warmup 20 and horizon 100: the rate after 0 (counts as 1), 20, 60, 100 and 101 steps.
# The middle of the decay is x = 1/2; wsd decays over the last 40 steps, of which at 90 three quarters are over.
CLOSED_FORMS = {
    ("constant", ""): {0: 1 / 20, 20: 1, 60: 1, 100: 1, 101: 1},
    ("linear", ""): {0: 1 / 20, 20: 1, 60: 1 / 2, 100: 0.1, 101: 0.1},
    ("cosine", ""): {0: 1 / 20, 20: 1, 60: 0.55, 100: 0.1, 101: 0.1},
    ("exponential", ""): {
        0: 1 / 20,
        20: 1,
        60: math.exp(-0.3465),
        100: math.exp(-0.693),
        101: math.exp(-0.693 * 81 / 80),
    },
    ("inverse_sqrt", ""): {0: 1 / 20, 20: 1, 60: 3**-0.5, 100: 5**-0.5, 101: (20 / 101) ** 0.5},
    ("wsd", "linear"): {0: 1 / 20, 20: 1, 60: 1, 80: 0.55, 90: 0.325, 100: 0.1, 101: 0.1},
    ("wsd", "cosine"): {0: 1 / 20, 20: 1, 60: 1, 80: 0.55, 90: 0.1 + 0.45 * (1 - 2**-0.5), 100: 0.1, 101: 0.1},
    ("wsd", "1-sqrt"): {0: 1 / 20, 20: 1, 60: 1, 70: 0.55, 80: 1 - 0.9 * 2**-0.5, 100: 0.1, 101: 0.1},
}


@pytest.mark.parametrize(("style", "shape"), CLOSED_FORMS)
def test_closed_form_and_after_resume(style, shape):
    extra = {"decay_fraction": 0.4, "decay_shape": shape} if shape else {}
    run = LRSchedule(peak=1.0, minimum=0.1, style=style, warmup=20.0, horizon=100, **extra)
    # What a checkpoint says goes through JSON; the configuration that takes it up says something else.
    saved = json.loads(json.dumps(run.state_dict(60)))
    choice = {"override_lr_scheduler": False, "use_checkpoint_lr_scheduler": True}
    resumed = schedule("constant").reconcile(saved, **choice)
    assert resumed == run
    for step, expected in CLOSED_FORMS[style, shape].items():
        assert run.lr_at(step) == pytest.approx(expected, rel=1e-12)
        assert resumed.lr_at(step) == run.lr_at(step)


def test_checkpoints_hold_the_decay_of_wsd():
    run = LRSchedule(peak=1.0, minimum=0.1, style="wsd", warmup=20.0, horizon=100, decay_shape="linear")
    saved = run.state_dict(5)
    assert saved["wsd_decay_fraction"] == 0.1
    flags = {"override_lr_scheduler": False, "use_checkpoint_lr_scheduler": False}
    assert run.reconcile(saved, **flags) == run
    other = LRSchedule(peak=1.0, minimum=0.1, style="wsd", warmup=20.0, horizon=100, decay_shape="cosine")
    with pytest.raises(CheckpointError, match="wsd_decay_shape is cosine in the config, linear in the checkpoint"):
        other.reconcile(saved, **flags)
    del saved["wsd_decay_shape"]
    with pytest.raises(CheckpointError, match="lacks wsd_decay_shape"):
        run.reconcile(saved, **flags)


def test_inverse_sqrt_quarters_the_squared_rate():
    decay = schedule("inverse_sqrt", warmup=25.0, minimum=0.0)
    assert decay.lr_at(25) == pytest.approx(3e-4)
    assert decay.lr_at(100) == pytest.approx(1.5e-4)
    assert decay.lr_at(2500) == pytest.approx(3e-5)


WSD = {"wsd_decay_fraction": 0.1, "wsd_decay_shape": "1-sqrt"}


def config(**changes):
    section = SimpleNamespace(
        min_lr=1e-5, lr_decay_style="linear", warmup=0.01, lr_decay_iters=400, scheduler=None, **WSD
    )
    vars(section).update(changes)
    return SimpleNamespace(optimizer=SimpleNamespace(lr=1e-3), schedule=section)


def test_from_config():
    assert LRSchedule.from_config(config()) == LRSchedule(1e-3, 1e-5, "linear", 4.0, 400)
    wsd = config(lr_decay_style="wsd", wsd_decay_fraction=0.25, wsd_decay_shape="cosine")
    assert LRSchedule.from_config(wsd) == LRSchedule(1e-3, 1e-5, "wsd", 4.0, 400, 0.25, "cosine")
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wsd_decay_fraction": 0.2}, "wsd_decay_fraction: is for lr_decay_style wsd, and that is linear"),
        ({"lr_decay_style": "wsd", "wsd_decay_shape": "sqrt"}, "'sqrt' is unknown"),
        ({"lr_decay_style": "wsd", "wsd_decay_fraction": 0.5, "warmup": 0.6}, "are more than the whole"),
    ],
)
def test_settings_that_make_no_schedule(changes, words):
    small = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32}
    with pytest.raises(ConfigError, match=words):
        config_from_dict(small | {"max_position_embeddings": 32, "train_iters": 100} | changes, world_size=1)
