"""Every damage of a native checkpoint is found and named; the newest whole one is found too."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.small_checkpoints import NAMES, save

from neox.checkpoint.native.fallback import Check, checkpoint_to_load
from neox.checkpoint.native.integrity import damages, quick_damages, team_damages
from neox.checkpoint.native.manifest import Manifest
from neox.checkpoint.native.store import NativeReader, Team
from neox.errors import CheckpointError

MODEL_FILE = "model-00000-000.safetensors"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_whole_checkpoint_has_no_damages_and_every_byte_of_it_is_looked_at_once(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    seen: list[tuple[str, int]] = []
    assert damages(folder, each=lambda name, count: seen.append((name, count))) == []
    names = {path.relative_to(folder).as_posix() for path in files_of(folder)}
    assert {name for name, _ in seen} == names - {"manifest.json"} == set(Manifest.read(folder).files)
    assert sum(count for name, count in seen if name == MODEL_FILE) == 3 * 6 * 2


def test_flipped_bits_of_every_file_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    for path in files_of(folder):
        content = path.read_bytes()
        for position in range(0, len(content), 4 if path.name == "manifest.json" else 1):
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 8
            path.write_bytes(flipped)
            found = damages(folder)
            assert found, f"byte {position} of {path}"
            assert path.name in found[0] or (path.name == "manifest.json" and "manifest" in found[0])
        path.write_bytes(content)
    assert damages(folder) == []


def test_a_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    for path in files_of(folder):
        content = path.read_bytes()
        for length in range(0, len(content), max(1, len(content) // 40)):
            path.write_bytes(content[:length])
            assert path.name in damages(folder)[0]
        path.unlink()
        assert path.name in damages(folder)[0]
        assert path.name in quick_damages(folder)[0]
        path.write_bytes(content)


def test_each_damage_has_a_line(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    (folder / "optimizer-00000-001.safetensors").unlink()
    (folder / "configs/model.yml").write_text("num_layers: 3\n")
    flip(folder / MODEL_FILE, -1)
    flip(folder / MODEL_FILE, -13)
    found = damages(folder)
    assert len(found) == 4
    assert [line for line in found if NAMES[1] in line]
    assert [line for line in found if NAMES[2] in line]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def test_a_reader_refuses_the_damaged_tensor_and_reads_the_others(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    flip(folder / MODEL_FILE, -1)
    reader = NativeReader(folder)
    assert reader.tensor(NAMES[0]).shape == (6,)
    with pytest.raises(CheckpointError, match=rf"{MODEL_FILE}: damaged, {NAMES[2]} is not what was written"):
        reader.tensor(NAMES[2])


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    rewritten(folder / "manifest.json", lambda content: content["progress"].update(iteration=4))
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged, its checksum"):
        NativeReader(folder)


def test_a_file_of_another_checkpoint_is_refused_by_its_header(tmp_path: Path) -> None:
    folder, other = save(tmp_path, 3), save(tmp_path / "other", 3, numbers=3)
    shutil.copy(other / MODEL_FILE, folder / MODEL_FILE)
    assert "bytes, the manifest says" in damages(folder)[0]
    text = (save(tmp_path / "third", 3) / MODEL_FILE).read_bytes().replace(b"layers.3", b"layers.7")
    (folder / MODEL_FILE).write_bytes(text)
    with pytest.raises(CheckpointError, match=r"it has nothing for layers\.3\..*the manifest says bfloat16 \[6\]"):
        NativeReader(folder).tensor(NAMES[0])


def teams(size: int) -> list[Team]:
    """Ranks that are threads."""
    barrier, items = threading.Barrier(size, timeout=240), [None] * size

    def gather_as(rank: int) -> Callable[[Any], list[Any]]:
        def gather(item: Any) -> list[Any]:
            items[rank] = item
            barrier.wait()
            everyone = list(items)
            barrier.wait()
            return everyone

        return gather

    return [Team(rank, size, gather_as(rank)) for rank in range(size)]


def test_ranks_share_the_files_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 3)
    flip(folder / MODEL_FILE, -1)
    (folder / "configs/model.yml").unlink()
    shares: list[list[str]] = []
    for rank in range(3):
        seen: list[str] = []
        damages(folder, share=(rank, 3), each=lambda name, _, seen=seen: seen.append(name))
        shares.append(sorted(set(seen)))
    assert sorted(name for share in shares for name in share) == [MODEL_FILE, "optimizer-00000-001.safetensors"]
    found: list[list[str]] = [[] for _ in range(3)]

    def look(team: Team) -> None:
        found[team.rank] = team_damages(folder, team)

    threads = [threading.Thread(target=look, args=(team,)) for team in teams(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert sorted(found[0]) == sorted(damages(folder))
    assert len(found[0]) == 2


THOROUGH = Check(damages)


@pytest.mark.parametrize("check", [Check(), THOROUGH], ids=["quick", "thorough"])
def test_the_newest_whole_one_before_a_damaged_one(tmp_path: Path, check: Check) -> None:
    for iteration in (5, 30, 10, 20):
        save(tmp_path, iteration)
    assert checkpoint_to_load(tmp_path, None, fallback=True, check=check) == tmp_path / "global_step20"
    (tmp_path / "global_step20" / MODEL_FILE).unlink()
    with pytest.raises(CheckpointError, match=rf"global_step20/{MODEL_FILE}: missing.*load_fallback: true"):
        checkpoint_to_load(tmp_path, None, fallback=False, check=check)
    (tmp_path / "global_step10" / "manifest.json").unlink()
    warnings: list[str] = []
    check = Check(check.damages, warnings.append)
    assert checkpoint_to_load(tmp_path, None, fallback=True, check=check) == tmp_path / "global_step5"
    assert len(warnings) == 1
    assert f"global_step20/{MODEL_FILE}: missing" in warnings[0]
    assert f"loading {tmp_path / 'global_step5'} instead" in warnings[0]
    shutil.rmtree(tmp_path / "global_step5")
    with pytest.raises(CheckpointError, match="no whole checkpoint before it"):
        checkpoint_to_load(tmp_path, None, fallback=True, check=check)


def test_only_a_thorough_check_reads_the_tensors(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / MODEL_FILE, -1)
    assert checkpoint_to_load(tmp_path, None, fallback=False) == tmp_path / "global_step2"
    assert checkpoint_to_load(tmp_path, None, fallback=True, check=THOROUGH) == tmp_path / "global_step1"


@pytest.mark.parametrize("latest", ["global_step9", "", "\udcff\udcff"])
def test_a_latest_that_names_nothing(tmp_path: Path, latest: str) -> None:
    save(tmp_path, 1)
    (tmp_path / "latest").write_bytes(latest.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"(no such checkpoint|latest: empty).*load_fallback"):
        checkpoint_to_load(tmp_path, None, fallback=False)
    assert checkpoint_to_load(tmp_path, None, fallback=True) == tmp_path / "global_step1"
    with pytest.raises(CheckpointError, match="global_step7: no such checkpoint"):
        checkpoint_to_load(tmp_path, 7, fallback=True)


def test_values_of_the_manifest_come_back(tmp_path: Path) -> None:
    manifest = Manifest.read(save(tmp_path, 3))
    assert manifest.config == {"num_layers": 2, "schedule": [1, 2.5], "by_number": {"7": None}}
    assert torch.equal(NativeReader(tmp_path / "global_step3").tensor(NAMES[0]), next(iter(first_tensors(3))))


def first_tensors(iteration: int) -> list[torch.Tensor]:
    from checkpoint.small_checkpoints import stored

    return [tensor.value for tensor in stored(iteration)]
