"""What is in a checkpoint, and in what two differ."""

import json
import math

import pytest
import torch
from checkpoint.small_checkpoints import RUN, save
from golden_models import GOLDENS, read_run
from scripts_of import run_script
from weight_sources import RandomWeights

from neox.checkpoint.conversion.convert import write_native
from neox.checkpoint.huggingface import export_huggingface
from neox.checkpoint.inspection import contents
from neox.checkpoint.inspection.contents import differences, facts_of
from neox.checkpoint.native.lineage import Lineage
from neox.checkpoint.open import open_checkpoint

TOOL = "tools/ckpts/inspect_checkpoint.py"
QKV = "layers.2.attention.query_key_value.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in the formats of GPT-NeoX, ours and Hugging Face."""
    folder = tmp_path_factory.mktemp("formats")
    config, _ = read_run("pipe_tp2")
    reader = open_checkpoint(GOLDENS / "pipe_tp2")
    write_native(reader, config, folder / "native")
    export_huggingface(reader, config.model, folder / "hf", dtype=torch.float32)
    export_huggingface(reader, config.model, folder / "half", dtype=torch.float16)
    return {"neox": GOLDENS / "pipe_tp2", **{name: folder / name for name in ("native", "hf", "half")}}


def test_the_run_and_those_before_it_are_shown(tmp_path, capsys):
    folder = save(tmp_path, 1, lineage=Lineage("child", ("first", "second")))
    assert run_script(TOOL, folder, "--dry-run") == 0
    assert "run child, resumed_from first second, " in capsys.readouterr().out
    assert run_script(TOOL, save(tmp_path, 2), "--json") == 0
    about = json.loads(capsys.readouterr().out)["checkpoint"]
    assert about["run"] == RUN.run
    assert "resumed_from" not in about


def test_a_selection_that_means_no_tensor_is_a_mistake(folders, capsys):
    """Nothing to compare is not equal."""
    for flags, message in (
        (("--match", "atention"), "--match atention: no tensor has such a name"),
        (("--attributes", "layers/2", "layers/99"), "--attributes layers/99: no such tensor or layer"),
    ):
        assert run_script(TOOL, folders["neox"], folders["native"], *flags) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("pieces", [7, 2**22])
def test_facts_of_a_tensor(pieces, monkeypatch):
    monkeypatch.setattr(contents, "PIECE", pieces)
    tensor = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 12.0]]).to(torch.bfloat16)
    found = facts_of("layers.0.x", tensor)
    assert (found.shape, found.dtype, found.bytes) == ((3, 3), "bfloat16", 18)
    assert (found.norm, found.largest, found.not_finite) == (13.0, 12.0, 0)
    broken = facts_of("layers.0.x", torch.tensor([3.0, math.inf, 4.0, math.nan]))
    assert (broken.norm, broken.largest, broken.not_finite) == (5.0, 4.0, 2)
    # squares of large fp16 numbers are beyond fp16 and their sums beyond fp32
    large = facts_of("layers.0.x", torch.full((4,), 60000.0, dtype=torch.float16))
    assert large.norm == pytest.approx(120000, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "format_"), [("neox", "GPT-NeoX, pipeline layout"), ("native", "native"), ("hf", "Hugging Face, GPTNeoX")]
)
def test_the_tree_is_the_same_in_every_format(folders, capsys, name, format_):
    assert run_script(TOOL, folders[name], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoint"]["format"].startswith(format_)
    weights = open_checkpoint(folders["neox"])
    assert sorted(tensor["name"] for tensor in found["tensors"]) == sorted(weights.names())
    for tensor in found["tensors"]:
        whole = weights.tensor(tensor["name"])
        assert tuple(tensor["shape"]) == whole.shape
        assert tensor["dtype"] == "float32"
        assert tensor["norm"] == pytest.approx(float(whole.double().norm()), rel=1e-9)
        assert tensor["largest"] == float(whole.abs().max())


def test_a_checkpoint_says_how_far_it_is_and_who_wrote_it(folders, capsys):
    assert run_script(TOOL, folders["neox"], "--match", "layers.2.attention.*bias") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "iteration 3, model_parallel_size 2, " in lines[1]
    assert [line.split()[0] for line in lines[2:5]] == [
        "layers.2",
        "attention.query_key_value.bias",
        "attention.dense.bias",
    ]
    assert lines[5].startswith("  2 tensors, 128 parameters, 512 bytes")
    assert run_script(TOOL, folders["native"], "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.startswith("would read")
    assert "precision fp32" in out
    assert "layers" not in out


def test_equal_checkpoints_of_two_formats(folders, capsys):
    for other in ("native", "hf"):
        assert run_script(TOOL, folders["neox"], folders[other]) == 0
        assert "all 28 tensors are equal" in capsys.readouterr().out


def test_rounding_is_a_difference_and_is_measured(folders, capsys):
    assert run_script(TOOL, folders["native"], folders["half"], "--json") == 1
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["differences"]}
    weights = open_checkpoint(folders["neox"])
    assert set(found) <= set(weights.names())
    whole = weights.tensor(QKV).double()
    apart = whole - whole.half().double()
    assert found[QKV]["kind"] == "values"
    assert found[QKV]["largest"] == float(apart.abs().max()) > 0
    assert found[QKV]["norm"] == pytest.approx(float(apart.norm()))
    assert found[QKV]["norms"][0] == pytest.approx(float(whole.norm()))


def test_other_shapes_and_names(tmp_path, folders, capsys):
    config, _ = read_run("pipe_tp2")
    other = config.model.model_copy(update={"num_layers": 1, "padded_vocab_size": 96})
    export_huggingface(RandomWeights(other), other, tmp_path / "small", dtype=torch.float32)
    assert run_script(TOOL, folders["neox"], tmp_path / "small") == 1
    out = capsys.readouterr().out
    assert "layers.0.word_embeddings.weight" in out
    assert "[64, 32] and [96, 32]" in out
    assert f"{QKV.replace('.2.', '.3.')}" in out
    assert "only in the first" in out
    assert "only in the second" in out
    found = list(differences(open_checkpoint(tmp_path / "small"), open_checkpoint(folders["neox"]), [QKV]))
    assert len(found) == 1
    assert found[0] is not None
    assert found[0].kind == "values"


def test_numbers_that_are_none_are_compared(tmp_path):
    class Source:
        folder, padded_vocab_size = tmp_path, 1

        def __init__(self, *values):
            self.values = torch.tensor(values)

        def names(self):
            return ["layers.0.x"]

        def shapes(self):
            return {"layers.0.x": tuple(self.values.shape)}

        def tensor(self, name):
            return self.values

    one = Source(1.0, math.nan, math.inf)
    assert list(differences(one, Source(1.0, math.nan, math.inf), one.names())) == [None]
    for other in (Source(1.0, 2.0, math.inf), Source(1.0, math.nan, -math.inf), Source(math.nan, math.nan, math.inf)):
        (found,) = differences(one, other, one.names())
        assert found.largest == math.inf


def test_mistakes_are_one_line(folders, tmp_path, capsys):
    assert run_script(TOOL, tmp_path) == 2
    assert "no checkpoint; found nothing" in capsys.readouterr().err
    assert run_script(TOOL, folders["neox"], "--match", "[") == 2
    assert "--match [: no regular expression (unterminated" in capsys.readouterr().err
    assert run_script(TOOL, *[folders["neox"]] * 3) == 2
    assert "one is shown, two are compared" in capsys.readouterr().err
    assert run_script(TOOL, folders["neox"], "--compare") == 2


def test_flags_of_gpt_neox(folders, capsys, monkeypatch):
    shells = []
    monkeypatch.setattr("code.interact", lambda banner, local: shells.append(local["checkpoints"]))
    assert run_script(TOOL, f"{folders['neox']},{folders['hf']}", "--compare", "--diff", "-i") == 0
    assert "all 28 tensors are equal" in capsys.readouterr().out
    assert [reader.folder for reader in shells[0]] == [folders["neox"] / "global_step3", folders["hf"]]
    assert run_script(TOOL, folders["hf"], "--json", "--attributes", "layers/5/norm", "layers.3.mlp.linear2.bias") == 0
    found = json.loads(capsys.readouterr().out)["tensors"]
    assert [tensor["name"].split(".", 2)[2] for tensor in found] == ["mlp.linear2.bias", "norm.weight", "norm.bias"]
