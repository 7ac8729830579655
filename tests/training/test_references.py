"""Where the reference of an objective comes from: a checkpoint, the run's beginning, or log-probabilities on disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint.small_checkpoints import save as save_small
from golden_models import GOLDENS
from ranks import run_ranks
from training.preferences import MODEL, pairs, rewarded, trained

from neox.checkpoint.upstream.run import UpstreamRun
from neox.config import config_from_dict
from neox.data import IndexedDatasetWriter
from neox.errors import CheckpointError, ConfigError, DataError
from neox.inference.modes import run_generation
from neox.model.build import SINGLE
from neox.training.objectives.build import reference_folder
from neox.training.origin import Origin
from neox.training.preflight import prepare

SIDES = {f"{side}_train_{kind}": ["any"] for side in ("pos", "neg") for kind in ("data_paths", "label_data_paths")}
NORMAL = {"train_impl": "normal", "pack_impl": "packed"}


def compute_scores(flat: dict[str, Any], world_size: int) -> None:
    from neox.inference.session import without_pipeline
    from neox.parallel.mesh import build_mesh

    config = without_pipeline(config_from_dict(flat, world_size=world_size))
    run_generation(config, build_mesh(config))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained for a few steps, so that it differs from the fresh one."""
    folder = tmp_path_factory.mktemp("language_model")
    data = {k: v for k, v in rewarded(folder, splits=("train", "valid", "test")).items() if "reward" not in k}
    trained(MODEL | data | NORMAL | {"save": str(folder / "save"), "checkpoint_factor": 100}, 1)
    return folder / "save"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, language_model: Path) -> tuple[dict[str, Any], Any]:
    """Settings and figures of DPO that starts from the model, with a checkpoint on the way."""
    folder = tmp_path_factory.mktemp("tuned")
    flat = MODEL | pairs(folder) | {"train_impl": "dpo", "load": str(language_model), "finetune": True}
    flat |= {"save": str(folder / "save"), "extra_save_iters": [3]}
    return flat, trained(flat, 1)


def test_the_reference_is_the_model_it_began_with(tuned: tuple[dict[str, Any], Any], tmp_path: Path) -> None:
    flat, steps = tuned
    assert steps[0]["train/lm_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert steps[0]["train/ref_pos"] == pytest.approx(steps[0]["train/chosen_pos"], rel=1e-5)
    # Gone on with, it is not the model of the checkpoint that `load` names then.
    flat = flat | {"load": flat["save"], "finetune": False, "iteration": 3, "save": str(tmp_path)}
    assert trained(flat, 1) == steps[3:]
    kept = json.loads((tmp_path / "global_step6" / "manifest.json").read_text())["config"]["reference_load"]
    assert (
        kept
        == json.loads((Path(flat["load"]) / "global_step3" / "manifest.json").read_text())["config"]["reference_load"]
    )


def test_a_named_reference_wins(tuned: tuple[dict[str, Any], Any], tmp_path: Path) -> None:
    flat, steps = tuned
    named = flat | {"reference_load": flat["save"], "save": str(tmp_path), "exit_interval": 1}
    first = trained(named, 1)[0]
    assert first["train/chosen_pos"] == pytest.approx(steps[0]["train/chosen_pos"], rel=1e-6)
    assert first["train/ref_pos"] != pytest.approx(steps[0]["train/ref_pos"], rel=1e-2)


def test_a_reference_that_is_gone(tuned: tuple[dict[str, Any], Any], tmp_path: Path) -> None:
    flat, _ = tuned
    save_small(tmp_path, 5)
    (tmp_path / "latest").unlink()
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: has global_step5 and no latest; write the name"):
        prepare(config_from_dict(flat | {"reference_load": str(tmp_path)}))
    with pytest.raises(CheckpointError, match=r"^reference_load .*/nowhere: no such folder; name the checkpoint"):
        prepare(config_from_dict(flat | {"reference_load": "nowhere"}))


def test_another_objective_cannot_be_gone_on_with(tuned: tuple[dict[str, Any], Any], language_model: Path) -> None:
    flat, _ = tuned
    with pytest.raises(CheckpointError, match="was trained with train_impl normal, the configuration has dpo; set"):
        prepare(config_from_dict(flat | {"load": str(language_model), "finetune": False}))


def test_precomputed_scores_do_as_a_reference_does(tuned: tuple[dict[str, Any], Any], tmp_path: Path) -> None:
    flat, steps = tuned
    named = flat | {"precompute_model_name": "before", "text_gen_type": "precompute"}
    run_ranks(compute_scores, 2, named, 2)
    found = trained(named | {"save": str(tmp_path)}, 1)
    for step, wanted in zip(found, steps, strict=True):
        assert step == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in wanted.items()}
    # They were really read: the reference that is named does not exist.
    assert (
        trained(named | {"save": str(tmp_path / "b"), "reference_load": "nowhere", "exit_interval": 1}, 1) == found[:1]
    )
    # The checkpoint knows all the same which model the reference is, for when they are gone.
    live = flat | {"load": str(tmp_path), "finetune": False, "iteration": 3, "save": str(tmp_path / "live")}
    for step, wanted in zip(trained(live, 1), steps[3:], strict=True):
        assert step == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in wanted.items()}


def test_what_gpt_neox_compared_with_is_not_guessed() -> None:
    folder = GOLDENS / "seq" / "global_step4"
    upstream = UpstreamRun(folder)
    config = config_from_dict(MODEL | {"train_impl": "dpo", "dataset_impl": "pairwise", **SIDES})
    with pytest.raises(CheckpointError, match=f"^load {folder}: GPT-NeoX does not keep what .*; set reference_load to"):
        reference_folder(config, Origin(upstream, upstream))


def test_scores_of_other_documents_are_refused(tuned: tuple[dict[str, Any], Any]) -> None:
    flat, _ = tuned
    text = flat["pos_train_data_paths"][0]
    with pytest.raises(DataError, match=rf"{text}_missing.idx: no such file"):
        prepare(config_from_dict(flat | {"precompute_model_name": "missing"}))


def test_precompute_says_what_is_missing(tuned: tuple[dict[str, Any], Any]) -> None:
    flat, _ = tuned
    with pytest.raises(ConfigError, match="needs a name for what it writes; set precompute_model_name"):
        run_generation(config_from_dict(flat | {"text_gen_type": "precompute"}), SINGLE)


def test_documents_of_a_larger_vocabulary_are_not_scored(tuned: tuple[dict[str, Any], Any], tmp_path: Path) -> None:
    flat, _ = tuned
    with IndexedDatasetWriter(tmp_path / "larger", np.int32) as writer:
        writer.add_document(np.array([1, MODEL["padded_vocab_size"], 2]))
    changes = {"pos_train_data_paths": [str(tmp_path / "larger")], "precompute_model_name": "x"}
    with pytest.raises(DataError, match=r"larger: has token id 61, but the vocabulary of the model has 61 rows"):
        run_generation(config_from_dict(flat | changes | {"text_gen_type": "precompute"}), SINGLE)


def test_lora_compares_with_the_model_beneath(tuned: tuple[dict[str, Any], Any], tmp_path: Path) -> None:
    flat, steps = tuned
    flat = flat | {"lora": {"rank": 4}, "save": str(tmp_path)}
    found = trained(flat, 1)
    assert found[0]["train/ref_pos"] == pytest.approx(steps[0]["train/ref_pos"], rel=1e-6)
    assert found[0]["train/margins"] == pytest.approx(0.0, abs=1e-6)
    assert found[-1]["train/lm_loss"] < found[0]["train/lm_loss"]
    resumed = flat | {"load": str(tmp_path), "finetune": False, "iteration": 3, "save": str(tmp_path / "b")}
    assert trained(resumed, 1) == found[3:]


def test_a_reward_model_starts_from_a_language_model(language_model: Path, tmp_path: Path) -> None:
    flat = MODEL | pairs(tmp_path, for_rewards=True) | {"train_impl": "rm", "z_loss": 0.05}
    flat |= {"load": str(language_model), "finetune": True, "save": str(tmp_path / "save"), "extra_save_iters": [3]}
    found = trained(flat, 1)
    assert found[-1]["train/accuracy"] == 1.0
    manifest = json.loads((tmp_path / "save" / "global_step6" / "manifest.json").read_text())
    heads = {name: entry["shape"] for name, entry in manifest["tensors"].items() if name.startswith("layers.6.")}
    assert heads["layers.6.rm_linear.weight"] == [1, 32]
    assert not [name for name in heads if "final_linear" in name]
    resumed = flat | {"load": str(tmp_path / "save"), "finetune": False, "iteration": 3, "save": str(tmp_path / "b")}
    assert trained(resumed, 1) == found[3:]


def test_a_reward_model_writes_no_text(tmp_path: Path) -> None:
    flat = MODEL | pairs(tmp_path, for_rewards=True) | {"train_impl": "rm", "load": str(tmp_path)}
    with pytest.raises(ConfigError, match="train_impl: rm gives rewards and no text"):
        run_generation(config_from_dict(flat | {"text_gen_type": "unconditional"}), SINGLE)
