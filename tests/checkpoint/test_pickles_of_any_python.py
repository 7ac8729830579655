"""Files that other versions of Python wrote, byte for byte, and hostile relatives of what they write."""

import io
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from golden_models import GOLDENS

from neox.checkpoint.storage.torch_file import TorchFile, load_torch_file
from neox.checkpoint.storage.unpickle import (
    ALLOWED,
    ENUMS,
    EnumPlaceholder,
    ForbiddenNameError,
    Placeholder,
    RestrictedUnpickler,
)
from neox.checkpoint.upstream.run import UpstreamRun
from neox.errors import CheckpointError

STAGE = b"deepspeed.runtime.zero.config\nZeroStageEnum\n"
GETATTR = b"c__builtin__\ngetattr\n"
BY_NAME = {  # as Python 3.11.2 pickles ZeroStageEnum.gradients, by protocol
    2: b"\x80\x02" + GETATTR + b"q\x00c" + STAGE + b"q\x01X\x09\x00\x00\x00gradientsq\x02\x86q\x03Rq\x04.",
    4: b"\x80\x04\x95\x5a\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94\x8c\x07getattr\x94\x93\x94"
    b"\x8c\x1ddeepspeed.runtime.zero.config\x94\x8c\x0dZeroStageEnum\x94\x93\x94"
    b"\x8c\x09gradients\x94\x86\x94R\x94.",
}
BY_NAME[5] = BY_NAME[4].replace(b"\x80\x04", b"\x80\x05")
BY_VALUE = b"\x80\x02c" + STAGE + b"q\x00K\x02\x85q\x01Rq\x02."  # as 3.10, 3.11.7 and 3.12 to 3.14 do


def read(folder: Path, pickled: bytes) -> object:
    """What a file of `torch.save` with these objects holds."""
    with zipfile.ZipFile(folder / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickled)
    return TorchFile(folder / "x.pt").content


@pytest.mark.parametrize("pickled", [*BY_NAME.values(), BY_VALUE], ids=["2", "4", "5", "by value"])
def test_a_member_of_an_enumeration(tmp_path: Path, pickled: bytes) -> None:
    stage = read(tmp_path, pickled)
    assert isinstance(stage, EnumPlaceholder)
    assert (type(stage).__name__, stage.arguments) == ("ZeroStageEnum", (2,))


def test_enumerations_are_deepspeeds() -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaleProfile
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    found = (ZeroStageEnum, OffloadDeviceEnum, LossScaleProfile)
    assert {
        (kind.__module__, kind.__name__): {name: member.value for name, member in kind.__members__.items()}
        for kind in found
    } == ENUMS


def test_a_run_of_an_early_python_3_11_is_resumed(tmp_path: Path) -> None:
    source, folder = GOLDENS / "zero1_dp2" / "global_step3", tmp_path / "global_step3"
    shutil.copytree(source, folder)
    for path in folder.glob("*optim_states.pt"):
        with zipfile.ZipFile(path) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        (name,) = (name for name in records if name.endswith("/data.pkl"))
        records[name], count = re.subn(
            rb"c(" + re.escape(STAGE) + rb"q.)K\x01",
            lambda match: GETATTR + b"c" + match[1] + b"X\x10\x00\x00\x00optimizer_states\x86R0c" + match[1] + b"K\x01",
            records[name],
        )
        # The member by name, popped, then as the file has it: the memo keeps its numbers.
        assert count == 1
        with zipfile.ZipFile(path, "w") as archive:
            for other, content in records.items():
                archive.writestr(other, content)
    found, expected = UpstreamRun(folder), UpstreamRun(source)
    assert set(found.manifest.tensors) == set(expected.manifest.tensors)
    for key in expected.manifest.tensors:
        assert torch.equal(found.tensor(key), expected.tensor(key)), key


ENUM = b"c" + STAGE
MRO = b"X\x03\x00\x00\x00mro"
MEMBER = GETATTR + ENUM + b"X\x07\x00\x00\x00weights\x86R"


def call(kind: bytes, name: bytes) -> bytes:
    """`getattr(kind, name)`."""
    return GETATTR + kind + b"X" + len(name).to_bytes(4, "little") + name + b"\x86R."


def named(module: bytes, name: bytes) -> bytes:
    """A name by STACK_GLOBAL, in which it may have dots."""
    return b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, name)) + b"\x93."


NAMES = (
    *("__class__", "mro", "__subclasses__", "_member_map_", "__members__", "__init__", "__dict__", "members"),
    *("arguments", "gradients.value", "gradients.__class__", "", "Gradients", "weights\n", "value"),
)
KINDS = {
    "another class of DeepSpeed's": b"cdeepspeed.runtime.zero.config\nDeepSpeedZeroConfig\n",
    "the same name elsewhere": b"cdeepspeed.evil\nZeroStageEnum\n",
    "a class of the list": b"ccollections\nOrderedDict\n",
    "a function of the list": b"c_codecs\nencode\n",
    "a placeholder": b"cnumpy\nndarray\n)R",
    "a member": MEMBER,
    "a number type": b"cnumpy\ndtype\n",
    "a type of torch": b"ctorch\nfloat32\n",
    "itself": GETATTR,
    "nothing": b"N",
    "a text": b"X\x01\x00\x00\x00a",
}
OPCODES = {
    "with a default": GETATTR + ENUM + b"X\x01\x00\x00\x00aN\x87R.",
    "without a name": GETATTR + ENUM + b"\x85R.",
    "without anything": GETATTR + b")R.",
    "a number for a name": GETATTR + ENUM + b"K\x02\x86R.",
    "bytes for a name": GETATTR + ENUM + b"C\x09gradients\x86R.",
    "a list for a name": GETATTR + ENUM + b"]\x86R.",
    "chained": GETATTR + MEMBER + b"X\x05\x00\x00\x00value\x86R.",
    "from the memo": GETATTR + b"q\x000h\x00" + ENUM + MRO + b"\x86R.",
    "by OBJ": b"(" + GETATTR + ENUM + MRO + b"o.",
    "by INST": b"(" + ENUM + MRO + b"i__builtin__\ngetattr\n.",
    "its state by BUILD": GETATTR + b"}X\x08\x00\x00\x00__name__X\x01\x00\x00\x00asb.",
    "its slots by BUILD": GETATTR + b"N}X\x0c\x00\x00\x00__defaults__)s\x86b.",
    "slots of another function": b"c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
    "through what rebuilds tensors": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(" + GETATTR + b"N" + ENUM + MRO + b"\x86}tR."
    ),
    "an attribute of it": named(b"builtins", b"getattr.__self__"),
    "a dotted type": named(b"torch", b"float32.__class__"),
    "a module of torch": named(b"torch", b"_dynamo"),
    "setattr": b"c__builtin__\nsetattr\n.",
    "line ends in a name": named(b"builtins", b"a\nb\nc"),
    "bytearray of a size": b"c__builtin__\nbytearray\nK\x05\x85R.",
}
HOSTILE = (
    {f"name {name}": call(ENUM, name.encode()) for name in NAMES}
    | {label: call(kind, b"gradients") for label, kind in KINDS.items()}
    | OPCODES
)


@pytest.mark.parametrize("pickled", HOSTILE.values(), ids=HOSTILE)
def test_nothing_else_is_read_by_getattr(tmp_path: Path, pickled: bytes) -> None:
    encode = ALLOWED["_codecs", "encode"]
    before = dict(vars(encode)), encode.__defaults__
    pickled = b"\x80\x04" + pickled
    with pytest.raises(CheckpointError, match=r"x\.pt: asks for .*, which no checkpoint needs") as raised:
        read(tmp_path, pickled)
    assert "\n" not in str(raised.value)
    with pytest.raises(ForbiddenNameError):  # as files of before torch 1.6 are read
        RestrictedUnpickler(io.BytesIO(pickled)).load()
    assert (dict(vars(encode)), encode.__defaults__) == before


@pytest.mark.parametrize(
    "pickled",
    [
        GETATTR + b"(" + ENUM + b"X\x03\x00\x00\x00mrot\x81.",  # NEWOBJ
        GETATTR + b"(" + ENUM + b"X\x03\x00\x00\x00mrot}\x92.",  # NEWOBJ_EX
        ENUM + b"}X\x07\x00\x00\x00membersX\x01\x00\x00\x00asb.",  # BUILD on the class
        ENUM + b"N}X\x07\x00\x00\x00members}s\x86b.",
        ENUM + b"X\x01\x00\x00\x00aK\x01s.",  # SETITEM
        b"c__builtin__\nbytes\nK\x05\x85R.",
    ],
)
def test_no_object_is_made_of_it(tmp_path: Path, pickled: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pt: not readable as a torch file"):
        read(tmp_path, b"\x80\x04" + pickled)
    assert EnumPlaceholder.members == {}


def test_getattr_itself_is_no_function_of_python(tmp_path: Path) -> None:
    content = read(tmp_path, b"\x80\x02" + GETATTR + b".")
    assert content is not getattr
    with pytest.raises(pickle.UnpicklingError):
        content("text", "upper")


def test_a_described_tensor_cannot_be_changed(tmp_path: Path) -> None:
    """Its shape and place were compared with the size of the file when it was made."""
    torch.save(torch.arange(10.0), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive, zipfile.ZipFile(tmp_path / "lie.pt", "w") as lie:
        for info in archive.infolist():
            content = archive.read(info)
            if info.filename.endswith("/data.pkl"):
                content = content[:-1] + b"}X\x06\x00\x00\x00offsetJ\x00\x00\x00\x7fsb."
            lie.writestr(info.filename, content)
    with pytest.raises(CheckpointError, match="asks for a change"):
        TorchFile(tmp_path / "lie.pt")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_at_every_protocol(tmp_path: Path, protocol: int) -> None:
    values = {
        "bytes": (b"", b"\xff\x00"),
        "mutable": bytearray(b"\xff"),
        "empty": bytearray(),
        "sets": ({1, 2}, frozenset({3}), set(), frozenset()),
        "complex": 1.5 + 2j,
        "large": (2**80, -(2**70)),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
    }
    torch.save({"values": values, "w": torch.arange(3)}, tmp_path / "x.pt", pickle_protocol=protocol)
    found = load_torch_file(tmp_path / "x.pt")
    assert found["values"] == values
    assert [type(value) for value in found["values"].values()] == [type(value) for value in values.values()]
    assert found["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_any_python_are_inert(tmp_path: Path, module: str) -> None:
    content = read(tmp_path, f"\x80\x02c{module}\nPosixPath\n".encode("latin1") + b"X\x01\x00\x00\x00a\x85R.")
    assert isinstance(content, Placeholder)
    assert content.arguments == ("a",)


@pytest.mark.parametrize("core", ["core", "_core"])
def test_arrays_of_protocol_5_are_inert(tmp_path: Path, core: str) -> None:
    name = f"numpy.{core}.numeric".encode()
    content = read(tmp_path, b"\x80\x05c" + name + b"\n_frombuffer\n(C\x01aNK\x01\x85X\x01\x00\x00\x00CtR.")
    assert isinstance(content, Placeholder)
