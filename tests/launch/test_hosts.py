"""Hand-over to the DeepSpeed launcher."""

from pathlib import Path

import pytest
from training.layouts import ADAMW, MODEL, TRAINING

from neox.config import config_from_dict
from neox.errors import LaunchError
from neox.launch.hosts import deepspeed_command, slots, wants_launcher

BASE = MODEL | TRAINING | ADAMW


def test_nothing_asked() -> None:
    assert not wants_launcher(config_from_dict(BASE))
    assert slots(config_from_dict(BASE)) is None


def test_command_and_slots(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("one slots=8\n# a remark\ntwo slots=4\nthree slots=8\n")
    flat = BASE | {"hostfile": str(hostfile), "num_nodes": 2, "num_gpus": 6, "launcher": "OpenMPI", "account": "lab"}
    config = config_from_dict(flat, world_size=None)
    assert wants_launcher(config)
    assert slots(config) == 10
    command = deepspeed_command(config, ["train.py", "model.yml"])
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert command[-2:] == ["train.py", "model.yml"]
    for option in (f"--hostfile={hostfile}", "--num_nodes=2", "--num_gpus=6", "--launcher=openmpi"):
        assert option in command
    assert "--launcher_args=--account=lab" in command


@pytest.mark.parametrize(
    ("text", "word"), [("one 8\n", ":1:"), ("one slots=8\ntwo slots=many\n", ":2:")], ids=["no slots", "no number"]
)
def test_bad_hostfile(tmp_path: Path, text: str, word: str) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(text)
    with pytest.raises(LaunchError, match=word):
        slots(config_from_dict(BASE | {"hostfile": str(hostfile)}, world_size=None))


def test_a_named_file_that_is_not_there_means_this_machine(tmp_path: Path) -> None:
    config = config_from_dict(BASE | {"hostfile": str(tmp_path / "mock")}, world_size=None)
    assert not wants_launcher(config)
    assert slots(config) is None


def test_slurm_without_srun_says_what_to_type() -> None:
    config = config_from_dict(BASE | {"deepspeed_slurm": True})
    with pytest.raises(LaunchError, match="srun"):
        deepspeed_command(config, ["train.py"])
