"""What is generated from the declarations: the pages, the schema, the view of a resolved configuration."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from config.config_samples import sample

from neox.config import config_from_dict, load_config, show
from neox.config.__main__ import main
from neox.config.json_schema import json_schema
from neox.config.reference import MARK, pages
from neox.config.schema import fields_with_keys, known_keys, other_keys
from neox.config.yaml_files import merge
from neox.errors import ConfigError

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).parents[2]
VALIDATOR = jsonschema.Draft202012Validator(json_schema())
FILES = sorted((ROOT / "configs").rglob("*.yml"))


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_generated_pages_are_fresh(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == pages()[path], "stale; run make docs"


def test_docs_command_tells_a_stale_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for folder in ("docs", "configs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "docs/configuration.md").write_text("Prose.\n\n")
    monkeypatch.setattr("neox.config.reference.ROOT", tmp_path)
    assert main(["docs", "--check"]) == 2
    assert "stale; run make docs" in capsys.readouterr().err
    assert not (tmp_path / "configs/schema.json").exists()
    assert main(["docs"]) == 0
    assert main(["docs", "--check"]) == 0
    page = (tmp_path / "docs/configuration.md").read_text()
    assert page.startswith("Prose.\n\n<!-- ")
    (tmp_path / "docs/configuration.md").write_text(page.replace("Number of blocks.", "Number of bricks."))
    assert main(["docs", "--check"]) == 2


def test_the_page_has_a_row_for_every_key() -> None:
    page = pages()[ROOT / "docs" / "configuration.md"].partition(MARK)[2]
    rows = re.findall(r"^\| `([\w.]+)` \|", page, flags=re.MULTILINE)
    assert sorted(rows) == sorted([place.key for _, place in fields_with_keys()] + list(other_keys()))
    assert "| `min_lr` | number, at least 0 | `0.0` |" in page
    assert '| `launcher` | `pdsh`, `ssh`, `openmpi`, `mpich`, `mvapich`, `slurm` | `"pdsh"` |' in page
    assert "| `num_layers` | integer, above 0" in page
    assert "| `s3_chunk_size` | integer, at least 5242880, at most 5368709120 |" in page
    for line in page.partition("## Keys")[2].splitlines():
        if line.startswith("| `"):
            assert len(re.split(r"(?<!\\)\|", line)) in (5, 6, 8), line


def test_schema_is_one_and_knows_every_key() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"].keys() == known_keys()
    assert all(
        entry.get("description") for key, entry in schema["properties"].items() if key not in ("optimizer", "lora")
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_files_satisfy_the_schema(path: Path) -> None:
    assert not [error.message for error in VALIDATOR.iter_errors(merge([path], []).values)]


@pytest.mark.parametrize(
    "flat",
    [
        {"num-layers": 2, "train-micro-batch-size-per-gpu": 1e3},
        {"min_lr": "1e-8", "save": None, "checkpoint_factor": "1e3"},
        {"optimizer": {"type": "AdamW", "params": {"anything": 1}}, "precision": "BF16"},
        {"rpe_num_buckets": 32, "autotuning": {"enabled": False, "x": 1}, "sparsity_config": {}, "rank": None},
        {"zero_optimization": {"stage": 1, "cpu_offload": False}, "fp16": {"enabled": True, "fp16": True}},
        {"attention_config": [[["flash"], 12]], "train_data_paths": ["a"], "extra_save_iters": [0, 1]},
        {"hysteresis": 2, "rope_fusion": True, "use_wandb": False},
    ],
)
def test_schema_accepts_what_the_loader_accepts(flat: dict[str, Any]) -> None:
    assert not [error.message for error in VALIDATOR.iter_errors(flat)]


@pytest.mark.parametrize(
    "flat",
    [
        {"num_layer": 2},
        {"num-layer": 2},
        {"num-layers": "2"},
        {"num_layers": 1.5},
        {"seed": 0},
        {"warmup": 2},
        {"min_lr": "small"},
        {"finetune": "yes"},
        {"norm": "rmsnrm"},
        {"optimizer": {"type": "Adm"}},
        {"optimizer": {"type": "Adam", "lr": 1e-3}},
        {"zero_optimization": {"stage": 4}},
        {"zero_optimization": {"stge": 1}},
        {"bf16": {"enabled": "yes"}},
        {"train_data_paths": "a"},
        {"extra_save_iters": ["a"]},
        {"rpe_num_buckets": 8},
        {"autotuning": {"enabled": True}},
        {"rank": 3},
        {"hysteresis": "x"},
    ],
    ids=str,
)
def test_schema_refuses_what_the_loader_refuses(flat: dict[str, Any]) -> None:
    assert list(VALIDATOR.iter_errors(flat))
    with pytest.raises(Exception, match=next(iter(flat)).replace("-", "_")):
        config_from_dict(sample() | flat)


def complaint(flat: dict[str, Any]) -> str:
    """What the loader says against keys; empty if nothing."""
    try:
        config_from_dict(flat)
    except ConfigError as error:
        return str(error)
    return ""


def test_the_loader_knows_every_choice_of_the_schema() -> None:
    for key, entry in json_schema()["properties"].items():
        if key in other_keys():
            continue
        for part in (entry, *entry.get("anyOf", [])):
            for value in part.get("enum", []):
                assert f"{value!r} is unknown" not in complaint(sample() | {key: value})


def rows_of(*arguments: str, capsys: Any) -> str:
    assert main(["show", *arguments]) == 0
    return str(capsys.readouterr().out)


def test_show_names_the_source_of_each_value(tmp_path: Path, capsys: Any) -> None:
    path, over = tmp_path / "run.yml", tmp_path / "over.yml"
    path.write_text(
        "{num_layers: 2, hidden_size: 64, num_attention_heads: 4,\n"
        '"seq-length": 32, "rope-fusion": true,\n'
        '"optimizer": {"type": "Adam",\n  "params": {"lr": 1e-3, "betas": [0.9, 0.95]}}}\n'
    )
    over.write_text("{optimizer: {params: {lr: 2e-3}}}")
    files = [str(path), "--override", str(over), "train_iters=5"]
    shown = {
        key: (entry["value"], entry["source"])
        for key, entry in json.loads(rows_of(*files, "--json", capsys=capsys)).items()
    }
    assert shown["seq_length"] == (32, f"{path}:2")
    assert shown["train_iters"] == (5, "command line")
    assert shown["optimizer.params.betas"] == ([0.9, 0.95], f"{path}:4")
    assert shown["optimizer.params.eps"] == (1e-8, "default")
    assert shown["optimizer.params.lr"] == (2e-3, f"{over}:1")
    assert shown["optimizer.type"] == ("adam", f"{path}:3")
    assert shown["lr_decay_iters"] == (5, "derived")
    assert shown["max_position_embeddings"] == (32, "derived")
    assert shown["weight_decay"] == (0.1, "default")
    assert shown["rope_fusion"] == (True, f"{path}:2")
    assert {place.key for _, place in fields_with_keys()} - shown.keys() == {"optimizer.params"}
    table = rows_of(*files, "--given", capsys=capsys)
    assert re.search(r"^seq_length +32 +\S+:2$", table, flags=re.MULTILINE)
    assert "weight_decay" not in table
    assert re.search(r"^# without effect\nrope_fusion +true +\S+:2$", table, flags=re.MULTILINE)


@pytest.mark.parametrize("only_given", [False, True])
@pytest.mark.parametrize("name", ["20B", "small", "pythia/160M"])
def test_shown_yaml_resolves_to_the_same(name: str, only_given: bool, tmp_path: Path) -> None:
    config = load_config([ROOT / "configs" / name, ROOT / "configs" / "local_setup"], overrides=["lora.rank=2"])
    copy = tmp_path / "copy.yml"
    copy.write_text(show.as_yaml(config, only_given=only_given))
    again = load_config([copy])
    skipped = {"sources", "given", "files", "notices", "replaced"}
    assert again.model_dump(exclude=skipped) == config.model_dump(exclude=skipped)
    assert all(line.count("  # ") == 1 for line in copy.read_text().splitlines())


def test_flags_may_stand_between_files() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "neox.config", "check", "-d", "configs", "small", "--world-size", "8", "local_setup"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "valid: configs/small.yml, configs/local_setup.yml\n"
