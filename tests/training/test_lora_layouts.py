"""LoRA at every layout: the losses and factors of one process, a base that does not move, resuming, merging."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, SGD, TRAINING, Curve, curve_of

from neox.checkpoint.conversion.convert import largest_logit_difference
from neox.checkpoint.described import open_described
from neox.checkpoint.huggingface import export_huggingface
from neox.checkpoint.lora import MergedWeights, merged
from neox.checkpoint.native.store import NativeReader
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.weights import weight_source
from neox.config import config_from_dict
from neox.errors import CheckpointError
from neox.inference.loading import open_model
from neox.model.build import fresh_weights, layer_builder
from neox.model.layers import layer_list
from neox.model.lora import is_factor
from neox.parallel.mesh import build_mesh
from neox.training.preflight import prepare
from neox.training.run import build_engine, start_or_resume

ROOT = Path(__file__).parents[2]
STEPS, SAVED = 6, 3
LORA = {"lora": {"rank": 4, "alpha": 16.0}}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_recompute": (2, {"model_parallel_size": 2, "checkpoint_activations": True}),
    "tp2_sp": (2, {"model_parallel_size": 2, "sequence_parallel": True}),
    "pp2_tied": (2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2, "no_weight_tying": False}),
    "pp2_tp2_sp_recompute": (
        4,
        {
            "pipe_parallel_size": 2,
            "model_parallel_size": 2,
            "sequence_parallel": True,
            "gradient_accumulation_steps": 2,
            "checkpoint_activations": True,
        },
    ),
    "zero1": (2, {"zero_optimization": {"stage": 1}}),
    "zero2": (2, {"zero_optimization": {"stage": 2}}),
    "zero3_tied": (2, {"zero_optimization": {"stage": 3}, "no_weight_tying": False}),
}

WIDE: dict[str, Any] = {
    # What a Llama is made of: fused groups of unequal size, gates, no biases.
    "num_kv_heads": 2,
    "activation": "swiglu",
    "intermediate_size": 192,
    "norm": "rmsnorm",
    "gpt_j_residual": False,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
}


def settings(corpus: str, **changes: Any) -> dict[str, Any]:
    return MODEL | TRAINING | ADAMW | LORA | {"data_path": corpus, "train_iters": STEPS} | changes


@pytest.fixture(scope="module")
def references(corpus: str) -> dict[bool, Curve]:
    """One process, untied and tied."""
    return {tied: curve_of(settings(corpus, no_weight_tying=not tied), 1) for tied in (False, True)}


def assert_same(found: Curve, reference: Curve) -> None:
    np.testing.assert_allclose(found.losses, reference.losses, rtol=0, atol=2e-5)
    np.testing.assert_allclose(found.norms, reference.norms, rtol=1e-4, atol=0)
    assert found.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        tolerance = 2e-5 if is_factor(name) else 0.0
        np.testing.assert_allclose(found.weights[name], weight, rtol=0, atol=tolerance, err_msg=name)


def test_one_process_learns_and_the_base_stays(corpus: str, references: dict[bool, Curve]) -> None:
    for tied, reference in references.items():
        assert reference.losses[0] - reference.losses[-1] > 0.03
        source = fresh_weights(config_from_dict(settings(corpus, no_weight_tying=not tied)))
        for name, weight in reference.weights.items():
            start = source(name, torch.Size(weight.shape)).numpy()
            assert np.array_equal(weight, start) is not is_factor(name), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(corpus: str, references: dict[bool, Curve], layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    reference = references[not changes.get("no_weight_tying", True)]
    assert_same(curve_of(settings(corpus, **changes), world_size), reference)


def test_fused_groups_are_divided_alike(corpus: str) -> None:
    flat = settings(corpus, **WIDE, **SGD)
    assert_same(curve_of(flat | {"model_parallel_size": 2, "sequence_parallel": True}, 2), curve_of(flat, 1))


def test_a_stage_without_blocks_is_refused(corpus: str) -> None:
    layers = {"pipe_parallel_size": 2, "pipe_partition_method": "type:Embedding|OutputHead"}
    message = "pipe_partition_method: 'type:Embedding.*' leaves stage 1 without a block, .* set type:transformer"
    with pytest.raises(AssertionError, match=message):
        curve_of(settings(corpus, **layers), 2)


def dropped_inputs(sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """With identities as factors the update of a matrix is its input after dropout: 0 or 2."""
    lora = {"rank": 64, "alpha": 64.0, "dropout": 0.5, "targets": ["attention"]}
    flat = MODEL | TRAINING | {"lora": lora, "train_batch_size": 2}
    layout = {"model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    config = config_from_dict(flat | layout, world_size=2)
    mesh = build_mesh(config)
    torch.manual_seed(5)

    def source(name: str, shape: torch.Size) -> torch.Tensor:
        return torch.eye(64).repeat(shape[0] // 64, 1) if is_factor(name) else torch.zeros(shape)

    block = layer_builder(config, mesh, source)(layer_list(config.model)[1])
    length = 16 if sequence_parallel else 32
    whole, share = torch.ones(1, length, 64), torch.ones(1, 32, 32)
    inputs = {"attention.query_key_value": whole, "attention.dense": share}
    return {name: block.get_submodule(name)(x).detach() for name, x in inputs.items()}


def test_dropout_masks_differ_where_ranks_hold_different_inputs() -> None:
    first, second = run_ranks(dropped_inputs, 2, False)
    # Its 192 rows repeat the 64 inputs: the first 64 of rank 0 and the last 64 of rank 1 show the same.
    one, other = first["attention.query_key_value"][..., :64], second["attention.query_key_value"][..., -64:]
    assert set(one.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(one, other)
    assert torch.equal(first["attention.dense"], second["attention.dense"])
    left, right = first["attention.dense"].chunk(2, dim=-1)
    assert not torch.equal(left, right)

    first, second = run_ranks(dropped_inputs, 2, True)
    early, late = first["attention.query_key_value"].chunk(2, dim=1)
    assert not torch.equal(early, late)
    for stretch in (first["attention.dense"], second["attention.dense"]):
        assert stretch.shape == (1, 16, 64)
        assert not torch.equal(*stretch.chunk(2, dim=-1))


def train(flat: dict[str, Any], world_size: int) -> None:
    from neox.training.run import train as train_run

    torch.set_num_threads(1)
    train_run(config_from_dict(flat, world_size=world_size))


def saving(corpus: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Dropout on the update, so that the streams must go on too."""
    lora = {"lora": {"rank": 4, "alpha": 16.0, "dropout": 0.1}}
    save = {"save": str(folder), "extra_save_iters": [SAVED, STEPS]}
    return settings(corpus, **lora, **save) | changes


TRAINED = {"model_parallel_size": 2, "sequence_parallel": True, "checkpoint_activations": True}


@pytest.fixture(scope="module")
def run_folder(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run at tensor parallel size 2 and what it saved at two iterations."""
    folder = tmp_path_factory.mktemp("lora")
    run_ranks(train, 2, saving(corpus, folder, **TRAINED), 2)
    return folder


def assert_equal_checkpoints(found: Path, expected: Path) -> None:
    one, other = (NativeReader(root / f"global_step{STEPS}") for root in (found, expected))
    keys = set(other.manifest.tensors)
    assert set(one.manifest.tensors) == keys
    assert all(torch.equal(one.tensor(key), other.tensor(key)) for key in keys)


def test_resuming_is_bitwise(tmp_path: Path, corpus: str, run_folder: Path) -> None:
    flat = saving(corpus, tmp_path, **TRAINED) | {"load": str(run_folder), "iteration": SAVED}
    run_ranks(train, 2, flat, 2)
    assert_equal_checkpoints(tmp_path, run_folder)
    states = {key for key in NativeReader(tmp_path / f"global_step{STEPS}").manifest.tensors if "/" in key}
    assert states
    assert all(is_factor(key.partition("/")[0]) or key.startswith("rng/") for key in states)


@pytest.mark.parametrize(
    "changes",
    [{"zero_optimization": {"stage": 2}}, {"pipe_parallel_size": 2, "no_weight_tying": False}],
    ids=["zero2", "pp2_tied"],
)
def test_resuming_in_half_precision_is_bitwise(tmp_path: Path, corpus: str, changes: dict[str, Any]) -> None:
    half = {"precision": "bfloat16"} | changes
    whole, again = tmp_path / "whole", tmp_path / "again"
    run_ranks(train, 2, saving(corpus, whole, **half), 2)
    run_ranks(train, 2, saving(corpus, again, **half) | {"load": str(whole), "iteration": SAVED}, 2)
    assert_equal_checkpoints(again, whole)
    reader = NativeReader(whole / f"global_step{STEPS}")
    assert reader.tensor("layers.2.attention.dense.lora_B").dtype is torch.bfloat16
    assert reader.tensor("layers.2.attention.dense.lora_B/master").dtype is torch.float32


def test_another_layout_takes_the_run_up(tmp_path: Path, corpus: str, run_folder: Path) -> None:
    """Moments, factors and base go from tensor parallelism to ZeRO 3; the losses are those of one process."""

    def figures(changes: dict[str, Any], world_size: int) -> Curve:
        flat = saving(corpus, tmp_path, **LORA) | {"load": str(run_folder), "iteration": SAVED}
        return curve_of(flat | changes, world_size)

    assert_same(figures({"zero_optimization": {"stage": 3}}, 2), figures({}, 1))


def weights_at_the_start(flat: dict[str, Any]) -> dict[str, torch.Tensor]:
    config = config_from_dict(flat)
    engine, progress, _ = start_or_resume(config, build_mesh(config))
    assert progress.iteration == 0
    return {name: parameter.detach().clone() for name, parameter in engine.parameters().items()}


def assert_same_matrix(found: torch.Tensor, expected: torch.Tensor) -> None:
    """W + s B A added up twice in fp32: the order of its 1 + rank terms may depend on where in memory they lie."""
    bound = (1 + LORA["lora"]["rank"]) * 2**-23 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_finetuning_starts_from_merged_weights_with_fresh_factors(corpus: str, run_folder: Path) -> None:
    flat = settings(corpus, load=str(run_folder), finetune=True, seed=77)
    (started,) = run_ranks(weights_at_the_start, 1, flat)
    reader, fresh = merged(open_checkpoint(run_folder)), fresh_weights(config_from_dict(flat))
    for name, weight in started.items():
        expected = fresh(name, weight.shape) if is_factor(name) else reader.tensor(name)
        assert_same_matrix(weight, expected)
    moved = "layers.2.attention.dense.weight"
    assert not torch.equal(started[moved], NativeReader(reader.folder).tensor(moved))


def test_merged_weights_compute_the_same_here_and_in_transformers(
    tmp_path: Path, corpus: str, run_folder: Path
) -> None:
    config = config_from_dict(saving(corpus, tmp_path, load=str(run_folder)))
    reader = open_model(config)
    assert isinstance(reader, MergedWeights)
    export_huggingface(reader, config.model, tmp_path / "hf", dtype=torch.float32)
    assert largest_logit_difference(tmp_path / "hf", reader, config.model, dtype=torch.float32) < 1e-5

    ids = torch.randint(131, (2, 32), generator=torch.Generator().manual_seed(0))
    (unmerged,) = run_ranks(logits_of_the_run, 1, config.to_flat(), ids)
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, unmerged, rtol=1e-5, atol=1e-5)


def logits_of_the_run(flat: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """What the engine computes with the factors apart."""
    config = config_from_dict(flat)
    engine = build_engine(config, build_mesh(config), weight_source(open_checkpoint(Path(flat["load"]))))
    engine.deepspeed.eval()
    with torch.no_grad():
        return engine.deepspeed(ids).clone()


def test_a_run_goes_on_only_as_it_was(tmp_path: Path, corpus: str, run_folder: Path) -> None:
    def complaint(load: Path, **changes: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            prepare(config_from_dict(settings(corpus, load=str(load)) | changes))
        return str(caught.value)

    rank = complaint(run_folder, lora={"rank": 8})
    assert re.fullmatch("load .*: was trained with lora.rank 4, the configuration asks for 8; .*finetune: true.*", rank)
    targets = complaint(run_folder, lora={"rank": 4, "targets": ["dense"]})
    assert re.fullmatch(
        r"load .* lora.targets \[attention.query_key_value, .* asks for \[attention.dense\]; .*", targets
    )
    assert re.fullmatch("load .*: was trained with lora of rank 4; add the same lora.*", complaint(run_folder, lora={}))
    assert prepare(config_from_dict(saving(corpus, tmp_path, load=str(run_folder))))

    plain = tmp_path / "plain"
    run_ranks(train, 1, saving(corpus, plain, lora={}, train_iters=SAVED), 1)
    message = "load .*: was trained without lora; set finetune: true to start LoRA from its weights"
    assert re.fullmatch(message, complaint(plain))
    assert prepare(config_from_dict(settings(corpus, load=str(plain), finetune=True)))


def script(name: str) -> Callable[[list[str]], None]:
    """The main function of a script of tools/."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "tools" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_merging_script_writes_a_checkpoint_to_go_on_from(tmp_path: Path, corpus: str, run_folder: Path) -> None:
    merge = script("ckpts/merge_lora.py")
    merge(["--input_dir", str(run_folder), "--output_dir", str(tmp_path / "merged")])
    reader, expected = open_checkpoint(tmp_path / "merged"), merged(open_checkpoint(run_folder))
    assert sorted(reader.names()) == sorted(expected.names())
    for name in reader.names():
        assert_same_matrix(reader.tensor(name), expected.tensor(name))
    described = [open_described(folder)[1] for folder in (tmp_path / "merged", run_folder)]
    assert described[0].model == described[1].model
    assert not described[0].lora.is_on
    flat = settings(corpus, load=str(tmp_path / "merged"), lora={}, finetune=True)
    assert prepare(config_from_dict(flat))
    with pytest.raises(CheckpointError, match="has no LoRA factors"):
        merge(["--input_dir", str(tmp_path / "merged"), "--output_dir", str(tmp_path / "again")])
