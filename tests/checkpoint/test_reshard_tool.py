"""From one format to another by one tool."""

import pytest
import torch
from checkpoint.exports import SHAPE, exported, same_weights
from checkpoint.small_checkpoints import save
from golden_models import GOLDENS
from model_families import GQA
from scripts_of import run_script
from weight_sources import RandomWeights

from neox.checkpoint.conversion.convert import write_native
from neox.checkpoint.conversion.reshard import Target, reshard
from neox.checkpoint.described import open_described, progress_of
from neox.checkpoint.native.manifest import Progress
from neox.checkpoint.open import open_checkpoint
from neox.config import config_from_dict
from neox.errors import CheckpointError, ConfigError


def test_reshard_to_every_format(tmp_path):
    config = config_from_dict(SHAPE | GQA)
    weights = RandomWeights(config.model)
    write_native(weights, config, tmp_path / "native")
    native, config = open_described(tmp_path / "native")
    for number, target in enumerate((Target("sequential", tensor=2), Target("pipeline", pipe=2))):
        out = tmp_path / str(number)
        planned, files = reshard(native, config, out, target=target, progress=progress_of(native), dry_run=True)
        assert not out.exists()
        folder, same = reshard(native, config, out, target=target, progress=progress_of(native))
        assert (folder, same) == (planned, files)
        same_weights(open_checkpoint(folder), weights)
        # And on to ours again, from there.
        upstream, described = open_described(out)
        reshard(upstream, described, tmp_path / f"back{number}", target=Target("native"), progress=Progress())
        same_weights(open_checkpoint(tmp_path / f"back{number}"), weights)
    with pytest.raises(CheckpointError, match="is in our own format, which every layout loads as it is"):
        reshard(native, config, tmp_path / "no", target=Target("native"), progress=progress_of(native))
    half, _ = reshard(
        native, config, tmp_path / "half", target=Target("native", precision="bf16"), progress=progress_of(native)
    )
    reader, described = open_described(half)
    assert described.model.precision == reader.manifest.precision == "bfloat16"
    assert all(torch.equal(reader.tensor(name), weights.tensor(name).bfloat16()) for name in weights.names())
    for target, message in (
        (Target("sequential", pipe=2), "--pipe_parallel_size: the sequential format has no stages"),
        (Target("pipeline", tensor=0), "must be at least 1"),
        (Target("native", tensor=2), "--format native: holds whole tensors"),
    ):
        with pytest.raises(ConfigError, match=message):
            reshard(native, config, tmp_path / "no", target=target, progress=progress_of(native))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("has_latest", [True, False])
def test_the_folder_of_a_run_is_left_alone(tmp_path, capsys, has_latest):
    """It would go on from what was written."""
    save(tmp_path / "run", 7)
    if not has_latest:
        (tmp_path / "run" / "latest").unlink()
    exported(tmp_path / "hf", **GQA)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    for tool, words in (
        ("convert_hf_to_neox.py", ["--hf_dir", tmp_path / "hf"]),
        ("reshard.py", ["--input_dir", tmp_path / "hf", "--format", "native"]),
        ("reshard.py", ["--input_dir", GOLDENS / "pipe_tp2", "--format", "sequential"]),
    ):
        assert run_script(f"tools/ckpts/{tool}", *words, "--output_dir", tmp_path / "run") == 2
        said = capsys.readouterr().err
        assert "run: holds checkpoints already (global_step7); name another folder" in said
        assert said.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert not has_latest or (tmp_path / "run" / "latest").read_text() == "global_step7"


def test_a_configuration_that_is_there_is_not_replaced(tmp_path, capsys):
    """`--config_file` is what this tool writes, and what the others read."""
    exported(tmp_path / "hf", **GQA)
    given = tmp_path / "mine.yml"
    given.write_text("num_layers: 2\n")
    words = ["--hf_dir", tmp_path / "hf", "--config_file", given, "--output_dir"]
    assert run_script("tools/ckpts/convert_hf_to_neox.py", *words, tmp_path / "out") == 2
    assert capsys.readouterr().err.endswith(
        f"{given}: exists already, with other content; name a new file in --config_file\n"
    )
    assert given.read_text() == "num_layers: 2\n"
    assert not (tmp_path / "out").exists()
    given.unlink()
    assert run_script("tools/ckpts/convert_hf_to_neox.py", *words, tmp_path / "out") == 0
    assert run_script("tools/ckpts/convert_hf_to_neox.py", *words, tmp_path / "again") == 0  # the same content


def test_reshard_script(tmp_path, capsys):
    flags = ["--input_dir", GOLDENS / "pipe_tp2", "--output_dir", tmp_path / "out", "--format", "sequential"]
    assert run_script("tools/ckpts/reshard.py", *flags, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "mp_rank_00_model_states.pt\n" in said
    assert "would write" in said
    assert not (tmp_path / "out").exists()
    assert run_script("tools/ckpts/reshard.py", *flags) == 0
    assert "wrote" in capsys.readouterr().out
    same_weights(open_checkpoint(tmp_path / "out"), open_checkpoint(GOLDENS / "pipe_tp2"))
    assert run_script("tools/ckpts/reshard.py", *flags) == 2
    assert capsys.readouterr().err.count("\n") == 1
