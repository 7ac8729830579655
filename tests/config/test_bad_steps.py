"""Rules of what is done about bad steps."""

from typing import Any

import pytest
from config.config_samples import sample

from neox.config import config_from_dict
from neox.errors import ConfigError

SAVES = {"save": "checkpoints", "checkpoint_factor": 10}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"on_bad_loss": "rewind"}, "on_bad_loss: rewind goes back to a checkpoint, and save is not set"),
        ({"loss_spike_deviations": 5}, "on_loss_spike: rewind goes back to a checkpoint, and save is not set"),
        (
            {"replica_check_interval": 5, "on_replica_mismatch": "rewind"},
            "on_replica_mismatch: rewind goes back to a checkpoint, and save is not set",
        ),
        (
            SAVES | {"no_save_optim": True, "gradient_norm_limit": 5, "on_large_gradient": "rewind"},
            "on_large_gradient: rewind needs the optimizer's state, and no_save_optim is true",
        ),
        (
            {"on_bad_loss": "skip", "zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
            "on_bad_loss: zenflow updates weights while a step is under way",
        ),
        (
            {"on_bad_loss": "ignore"},
            "on_bad_loss: 'ignore' is unknown; supported: 'stop', 'skip', 'skip_batch' or 'rewind'",
        ),
        ({"gradient_norm_limit": 0}, "gradient_norm_limit: "),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(sample(**changes))
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        SAVES | {"loss_spike_deviations": 5, "on_bad_loss": "Skip_Batch"},
        {"on_large_gradient": "rewind"},
        {"loss_spike_deviations": 5, "on_loss_spike": "skip"},
    ],
)
def test_what_can_be_done_or_is_idle_is_taken(changes: dict[str, Any]) -> None:
    assert config_from_dict(sample(**changes)).reliability.max_skips == 10
