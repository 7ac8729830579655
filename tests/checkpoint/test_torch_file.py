import os
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from golden_models import GOLDENS

from neox.checkpoint.storage.torch_file import LazyTensor, TorchFile, load_torch_file
from neox.checkpoint.storage.unpickle import Placeholder
from neox.errors import CheckpointError

LAYER = GOLDENS / "pipe" / "global_step4" / "layer_02-model_00-model_states.pt"


def assert_same(found, expected):
    if isinstance(expected, np.ndarray):  # which are states of random numbers, and not read
        assert isinstance(found, Placeholder)
        return
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("name", ["seq/global_step4", "pipe_pp2_tied/global_step3", "zero1_dp2/global_step3"])
def test_files_of_upstream_are_read_as_torch_reads_them(name):
    for path in sorted((GOLDENS / name).glob("*model_states.pt")):
        assert_same(load_torch_file(path), torch.load(path, weights_only=False))


def test_views_of_shared_storages(tmp_path):
    base = torch.arange(240.0).view(12, 20)
    with_attribute = torch.nn.Parameter(torch.ones(2))
    with_attribute.model_parallel = True
    tensors = {
        "whole": base,
        "rows": base[3:5],
        "columns": base[:, 4:9],
        "turned": base.t(),
        "every_other": base[::2, 1::3],
        "expanded": base[0, 0].expand(3, 2),
        "scalar": torch.tensor(3.5),
        "empty": base[:0],
        "parameter": with_attribute.detach(),
        "half": base.half()[1],
        "bfloat": base.bfloat16()[:, 2],
        "unsigned": torch.arange(5).to(torch.uint16),
        "bits": torch.tensor([True, False]),
    }
    torch.save(tensors, tmp_path / "views.pt")
    assert_same(load_torch_file(tmp_path / "views.pt"), tensors)
    torch.save(with_attribute, tmp_path / "parameter.pt")
    assert load_torch_file(tmp_path / "parameter.pt").tolist() == [1, 1]


def test_nothing_is_read_before_it_is_asked_for_and_stretches_alone(tmp_path):
    vector = torch.arange(1000.0)
    torch.save({"a": {"b": [vector]}}, tmp_path / "vector.pt")
    lazy = TorchFile(tmp_path / "vector.pt").content["a"]["b"][0]
    assert isinstance(lazy, LazyTensor)
    assert (lazy.shape, lazy.dtype, lazy.is_contiguous) == (vector.shape, vector.dtype, True)
    assert torch.equal(lazy.slice(10, 5), vector[10:15])
    overwrite(tmp_path / "vector.pt", vector.numpy().tobytes()[:400], b"\0" * 400)
    assert torch.equal(lazy.slice(10, 5), torch.zeros(5))
    assert torch.equal(lazy.slice(200, 800), vector[200:])
    with pytest.raises(CheckpointError, match=r"vector\.pt: a\.b\.0 cannot be read, its bytes are not those"):
        lazy.read()
    lazy.slice(0, 600)
    with pytest.raises(CheckpointError, match="by their checksum"):
        lazy.slice(600, 400)


def overwrite(path, old, new):
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


class Command:
    """Runs a shell command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Indirect:
    """Calls what rebuilds tensors with a function of its own choice."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return torch._tensor._rebuild_from_type_v2, (os.system, torch.Tensor, (self.command,), {})


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("attack", [Command, Indirect])
def test_a_pickle_that_runs_a_command_is_refused(tmp_path, attack, new_format):
    witness, path = tmp_path / "ran", tmp_path / "evil.pt"
    content = {"module": {"w": torch.ones(2)}, "args": attack(f"touch {witness}")}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"asks for posix\.system.*may be malicious"):
        load_torch_file(path)
    assert not witness.exists()


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("attack", ["array", "fields", "scalar"])
def test_a_pickle_cannot_have_numpy_take_bytes_for_addresses(tmp_path, attack, new_format):
    """Such an array is code execution; here it would be the end of the process."""

    class Forged:
        def __reduce__(self):
            if attack == "array":
                return np.ndarray, ((1,), "O", b"A" * 8)
            if attack == "scalar":
                return np.float64(0).__reduce__()[0], (np.dtype("O"), b"A" * 8)
            state = (1, (1,), Fields(), False, b"A" * 8)
            return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state

    class Fields:
        def __reduce__(self):
            hidden = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
            return np.dtype, ("V8", False, True), hidden

    torch.save({"args": Forged()}, tmp_path / "evil.pt", _use_new_zipfile_serialization=new_format)
    if attack == "scalar":
        with pytest.raises(CheckpointError, match="no number"):
            load_torch_file(tmp_path / "evil.pt")
    else:
        assert isinstance(load_torch_file(tmp_path / "evil.pt")["args"], Placeholder)


@pytest.mark.parametrize("name", ["builtins.eval", "torch.hub.load", "subprocess.Popen", "torch.serialization.load"])
def test_names_outside_the_list_are_refused(tmp_path, name):
    module, _, function = name.rpartition(".")
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("x/data.pkl", f"c{module}\n{function}\n.")
    with pytest.raises(CheckpointError, match=rf"asks for {name}, which no checkpoint needs"):
        load_torch_file(tmp_path / "evil.pt")


@pytest.mark.parametrize("new_format", [True, False])
def test_objects_of_other_packages_become_inert(tmp_path, monkeypatch, new_format):
    ran = []
    module = types.ModuleType("deepspeed_runtime_stand_in")
    module.__name__ = "deepspeed.runtime.stand_in"
    scaler = type("LossScaler", (), {"__setstate__": lambda self, state: ran.append(state)})
    scaler.__module__ = module.__name__
    module.LossScaler = scaler
    monkeypatch.setitem(sys.modules, module.__name__, module)
    kept = scaler()
    kept.scale = 8.0
    state = {
        "loss_scaler": kept,
        "rng": (np.random.RandomState(0).get_state(), np.float64(0.5), np.dtype(">i4").type(3), {1, 2}, b"\xff"),
        "tensor": torch.arange(3),
    }
    torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=new_format)
    loaded = load_torch_file(tmp_path / "state.pt")
    assert ran == []
    assert isinstance(loaded["loss_scaler"], Placeholder)
    assert loaded["loss_scaler"].state == {"scale": 8.0}
    assert_same(loaded["rng"], state["rng"])
    assert loaded["tensor"].tolist() == [0, 1, 2]


def test_programs_are_refused(tmp_path):
    torch.jit.script(torch.nn.Identity()).save(tmp_path / "program.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        load_torch_file(tmp_path / "program.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused_by_name(tmp_path, share):
    whole = LAYER.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.pt: not readable as a torch file") as raised:
        load_torch_file(tmp_path / "cut.pt")
    assert "\n" not in str(raised.value)


def test_any_flipped_bit_of_a_tensor_or_of_the_description_is_noticed(tmp_path):
    whole = bytearray(LAYER.read_bytes())
    path = tmp_path / "flipped.pt"
    with zipfile.ZipFile(LAYER) as archive:
        kept = [info for info in archive.infolist() if "/data" in info.filename]
    random = np.random.RandomState(0)
    for info in kept:
        extra = int.from_bytes(whole[info.header_offset + 28 : info.header_offset + 30], "little")
        begin = info.header_offset + 30 + len(info.filename) + extra
        place = begin + random.randint(info.file_size)
        flipped = whole.copy()
        flipped[place] ^= 1 << random.randint(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"flipped\.pt: .*checksum"):
            load_torch_file(path)


def test_descriptions_that_lie_are_refused(tmp_path):
    torch.save(torch.arange(10.0), tmp_path / "short.pt")
    with zipfile.ZipFile(tmp_path / "short.pt") as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    for old, new in ((b"K\x0a\x85", b"K\xff\x85"), (b"K\x0at", b"K\xfft")):
        assert records[name].count(old) == 1
        with zipfile.ZipFile(tmp_path / "lie.pt", "w") as archive:
            for other, content in records.items():
                archive.writestr(other, content.replace(old, new) if other == name else content)
        with pytest.raises(CheckpointError, match=r"larger than its storage|elements were announced"):
            load_torch_file(tmp_path / "lie.pt")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for other, content in records.items():
            archive.writestr(other, content)
    with pytest.raises(CheckpointError, match="compressed after"):
        load_torch_file(tmp_path / "packed.pt")


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "plain.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_torch_file(tmp_path / "plain.pt")["w"].tolist() == [1, 1, 1]
