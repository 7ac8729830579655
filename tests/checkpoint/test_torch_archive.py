"""Files of torch.save written one tensor at a time."""

import errno
import resource
import zipfile
from types import SimpleNamespace

import pytest
import torch

from neox.checkpoint.storage.torch_archive import TorchFileWriter


def test_torch_files_are_written_a_tensor_at_a_time(tmp_path):
    whole = torch.randn(6, 5)
    content = {
        "view": torch.empty(2, 5, device="meta"),
        "turned": torch.empty(5, 6, device="meta"),
        "empty": torch.empty(0, 3, dtype=torch.float16, device="meta"),
        "scalar": torch.empty((), dtype=torch.bfloat16, device="meta"),
        "now": torch.arange(3),
        "rest": (1, None, "text", [2.5]),
    }
    later = [whole[3:5], whole.t(), torch.empty(0, 3).half(), torch.tensor(2.0).bfloat16()]
    with TorchFileWriter(tmp_path / "file.pt", content) as writer:
        for tensor in later:
            writer.write(tensor)
    for options in ({"weights_only": True}, {"weights_only": True, "mmap": True}, {"weights_only": False}):
        read = torch.load(tmp_path / "file.pt", **options)
        assert all(torch.equal(read[key], tensor) for key, tensor in zip(content, later, strict=False))
        assert (read["now"].tolist(), read["rest"]) == ([0, 1, 2], content["rest"])
        assert read["turned"].is_contiguous()
    assert zipfile.ZipFile(tmp_path / "file.pt").testzip() is None
    with (
        pytest.raises(AssertionError, match="1 tensors were announced and did not come"),
        TorchFileWriter(tmp_path / "short.pt", {"a": torch.empty(1, device="meta")}),
    ):
        pass
    with (
        pytest.raises(AssertionError, match="was announced"),
        TorchFileWriter(tmp_path / "other.pt", {"a": torch.empty(1, device="meta")}) as writer,
    ):
        writer.write(torch.zeros(2))


def write_zeros(path, limit):
    """Write a megabyte where no file may be larger than `limit`."""
    content = {name: torch.empty(125_000, device="meta") for name in "ab"}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with TorchFileWriter(path, content) as writer:
            writer.write_all(torch.zeros(125_000) for _ in content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("free", "expected"), [(0, errno.ENOSPC), (2**40, errno.EIO)])
@pytest.mark.parametrize("limit", [0, 100_000, 999_900], ids=["at once", "in a tensor", "at the end"])
def test_storage_that_refuses_is_an_error_of_the_system(tmp_path, monkeypatch, limit, free, expected):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(OSError, match=r"file\.pt") as raised:
        write_zeros(tmp_path / "file.pt", limit)
    assert raised.value.errno == expected


def test_the_limit_of_the_test_above_is_what_stops_it(tmp_path):
    write_zeros(tmp_path / "file.pt", 2**30)
    assert 10**6 < (tmp_path / "file.pt").stat().st_size < 1.01 * 10**6
