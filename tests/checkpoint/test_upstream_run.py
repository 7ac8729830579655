"""Everything that a run is resumed from: the optimizer's state of every layout, and how far the run had come."""

import shutil

import numpy as np
import pytest
import torch
from checkpoint import upstream_runs
from checkpoint.upstream_folders import loss_of
from golden_models import GOLDENS, canonical, read_run
from ranks import run_ranks

from neox.checkpoint.native.manifest import Layout, Progress
from neox.checkpoint.storage.torch_file import load_torch_file
from neox.checkpoint.upstream.reader import Hints
from neox.checkpoint.upstream.run import UpstreamRun
from neox.checkpoint.upstream.zero import plain_states
from neox.checkpoint.weight_map import weight_map
from neox.errors import CheckpointError
from neox.model.build import build_decoder
from neox.parallel.splits import join_shards

ROW_BIASES = ("attention.dense.bias", "mlp.linear2.bias")
MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def train():
    """Plain AdamW on a run's batches from its initial weights, with upstream's weight decay."""

    def train(name, rates, *, row_bias_factor=1.0):
        config, record = read_run(name)
        initial = {canonical(key): torch.from_numpy(array) for key, array in np.load(GOLDENS / "seq_init.npz").items()}
        model = build_decoder(config.model, source=lambda key, shape: initial[key])
        factors = [row_bias_factor if key.endswith(ROW_BIASES) else 1.0 for key, _ in model.named_parameters()]
        groups = [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in model.parameters()]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
        losses = []
        for tokens, rate in zip(record["tokens"], rates, strict=True):
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad()
            loss = loss_of(model, tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        assert losses == pytest.approx(record["losses"], abs=1e-5)
        states = {name: optimizer.state[p] for name, p in model.named_parameters()}
        return {name: p.detach() for name, p in model.named_parameters()}, states

    # The first rate of `seq` is upstream's warmup spike: 0.01 / 0.04.
    rates = [0.25, *read_run("seq")[1]["lr_after_step"][:3]]
    # In `seq_tp2` each rank updates its own copy of a row-parallel bias, so that their sum takes double steps.
    return {"seq": train("seq", rates), "seq_tp2": train("seq_tp2", [5e-4, 5e-4, 1e-3], row_bias_factor=2.0)}


@pytest.mark.parametrize(("name", "step"), [("seq", 4), ("seq_tp2", 3)])
def test_weights_and_moments_are_those_that_training_gives(train, name, step):
    weights, states = train[name]
    run = UpstreamRun(GOLDENS / name / f"global_step{step}")
    assert run.manifest.progress == Progress(step, 2 * step, step, step)
    assert set(run.names()) == set(weights)
    for key, weight in weights.items():
        tolerance = 1e-5 if name == "seq_tp2" else 2e-3  # the spike makes rounding large
        assert (run.tensor(key) - weight).abs().max() <= tolerance, key
        for moment in MOMENTS:
            expected, found = states[key][moment], run.tensor(f"{key}/{moment}")
            assert found.abs().max() > 0
            assert (found - expected).norm() <= 1e-3 * expected.norm() + 1e-9, f"{key} {moment}"


def as_pipeline(source, target, *, stages=1):
    """The same run as the pipeline engine writes it: layers in files, the optimizer of each stage apart."""
    shutil.copytree(source, target)
    for rank, path in enumerate(sorted(target.glob("mp_rank_*"))):
        state = torch.load(path, weights_only=False)
        path.unlink()
        layers = {}
        for name, tensor in state.pop("module").items():
            _, index, local = name.split(".", 2)
            layers.setdefault(int(index), {})[local] = tensor.clone()
        for index, tensors in layers.items():
            torch.save(tensors, target / f"layer_{index:02d}-model_{rank:02d}-model_states.pt")
        optimizer = state.pop("optimizer")
        ranks = state["mp_world_size"]
        for stage, indices in enumerate(np.array_split(list(layers), stages)):
            part = stage_of(optimizer, layers, [int(index) for index in indices])
            content = state | {"module": None, "optimizer": part, "mp_world_size": stages * ranks}
            torch.save(content, target / f"mp_rank_{stage * ranks + rank:02d}_model_states.pt")


def stage_of(optimizer, layers, indices):
    """The state of a stage's parameters, numbered anew: first what decays, then what does not."""
    names = [(index, name) for index, tensors in layers.items() for name in tensors]
    groups = [[n for n in names if is_plain(n[1]) == plain] for plain in (False, True)]
    numbers = {name: number for number, name in enumerate([*groups[0], *groups[1]])}
    state, param_groups = {}, []
    for group, names_of_group in zip(optimizer["param_groups"], groups, strict=True):
        kept = [name for name in names_of_group if name[0] in indices]
        start = len(state)
        state |= {start + i: optimizer["state"][numbers[name]] for i, name in enumerate(kept)}
        param_groups.append(group | {"params": list(range(start, len(state)))})
    return {"state": state, "param_groups": param_groups}


def is_plain(name):
    return "norm" in name or name.endswith("bias")


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize(("name", "step"), [("seq", 4), ("seq_tp2", 3)])
def test_the_state_of_pipeline_stages_is_put_together(tmp_path, name, step, stages):
    expected = UpstreamRun(GOLDENS / name / f"global_step{step}")
    as_pipeline(expected.folder, tmp_path / "global_step9", stages=stages)
    found = UpstreamRun(tmp_path / "global_step9")
    assert_same_run(found, expected)
    assert found.manifest.layout == Layout(stages, 1, 2 if name == "seq_tp2" else 1, 0)


def assert_same_run(found, expected):
    assert set(found.manifest.tensors) == set(expected.manifest.tensors)
    assert found.manifest.progress == expected.manifest.progress
    for key in expected.manifest.tensors:
        assert torch.equal(found.tensor(key), expected.tensor(key)), key


def test_a_tied_embedding_on_the_last_stage_comes_first():
    run = UpstreamRun(GOLDENS / "pipe_pp2_tied" / "global_step3")
    second = load_torch_file(run.folder / "mp_rank_01_model_states.pt")["optimizer"]["state"]
    assert run.manifest.layout == Layout(2, 1, 1, 0)
    assert len(run.manifest.tensors) == 3 * 27
    for moment in MOMENTS:
        assert torch.equal(run.tensor(f"layers.0.word_embeddings.weight/{moment}"), second[0][moment])
        assert torch.equal(run.tensor(f"layers.3.attention.query_key_value.weight/{moment}"), second[1][moment])
        assert torch.equal(run.tensor(f"layers.5.norm.bias/{moment}"), second[14][moment])


def test_partitions_of_upstreams_zero_are_joined():
    run = UpstreamRun(GOLDENS / "zero1_dp2" / "global_step3")
    assert run.manifest.layout == Layout(1, 2, 1, 1)
    assert run.manifest.progress == Progress(3, 12, 3, 3)
    assert (run.manifest.precision, run.manifest.optimizer, run.manifest.schedule["min_lr"]) == ("fp32", "adam", 1e-4)
    assert run.manifest.config["hidden_size"] == 32
    for name in run.names():
        assert torch.equal(run.tensor(f"{name}/master"), run.tensor(name)), name
        for moment in MOMENTS:
            assert run.tensor(f"{name}/{moment}").abs().max() > 0


def test_a_run_before_its_first_step_has_no_moments():
    run = UpstreamRun(GOLDENS / "a_neox_pp0" / "ckpt" / "global_step0")
    assert run.manifest.progress == Progress()
    assert run.manifest.optimizer == "adam"
    assert set(run.manifest.tensors) == set(run.names())


def test_weights_without_an_optimizer_say_so(tmp_path):
    shutil.copytree(GOLDENS / "pipe" / "global_step4", tmp_path / "global_step4")
    for path in (tmp_path / "global_step4").glob("mp_rank_*"):
        path.unlink()
    manifest = UpstreamRun(tmp_path / "global_step4").manifest
    assert manifest.optimizer is None
    assert manifest.progress.iteration == 4


def zero(stage, **changes):
    return {"zero_optimization": {"stage": stage} | changes}


BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4}}
CASES = {
    "zero1_bf16": zero(1) | BF16,
    "bf16_optimizer": zero(1) | BF16 | {"data_types": {"grad_accum_dtype": "fp32"}},
    "zero2_fp16": zero(2) | FP16,
    "zero3_small_groups": zero(3, sub_group_size=5000, stage3_param_persistence_threshold=100),
    "zero3_bf16": zero(3) | BF16,
    "fp16": zero(0) | FP16,
}
PRECISIONS = {"fp16": "fp16", "zero2_fp16": "fp16", "zero3_small_groups": "fp32"}
STAGES = {"zero1_bf16": 1, "bf16_optimizer": 1, "fp16": 0, "zero3_small_groups": 3, "zero3_bf16": 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of DeepSpeed's for every case, from two data-parallel ranks."""
    root = tmp_path_factory.mktemp("deepspeed")
    return run_ranks(upstream_runs.save_runs, 2, root, CASES | ROUND_ROBIN)[0]


ROUND_ROBIN = {"round_robin": zero(2, round_robin_gradients=True) | BF16}


@pytest.mark.parametrize("case", CASES)
def test_the_state_is_what_deepspeed_says_it_is(saved, case):
    run, expected = UpstreamRun(saved[case].folder), saved[case].states
    assert {key for key in run.manifest.tensors if "/" in key} == set(expected)
    for key, value in expected.items():
        assert torch.equal(run.tensor(key), value), key
    precision = PRECISIONS.get(case, "bfloat16")
    assert run.manifest.precision == precision
    assert run.manifest.layout == Layout(1, 2, 1, STAGES.get(case, 2))
    for name in run.names():
        weights = run.tensor(name)
        assert torch.equal(weights, expected[f"{name}/master"].to(weights.dtype)), name
    progress = run.manifest.progress
    assert (progress.iteration, progress.consumed_samples) == (2, 8)
    # DeepSpeed's fp16 optimizer takes a step on zero gradients when it starts.
    assert progress.optimizer_step == (3 if case == "fp16" else 2)
    assert progress.loss_scaler.get("cur_scale") == (16 if precision == "fp16" else None)
    if case == "zero2_fp16":
        assert progress.loss_scaler == saved[case].scaler


def test_gradients_dealt_round_change_the_order(saved):
    # Of these DeepSpeed itself says what is wrong, so the 16-bit weights are the witness.
    run = UpstreamRun(saved["round_robin"].folder)
    assert len(run.manifest.tensors) == 4 * len(run.names())
    for name in run.names():
        assert torch.equal(run.tensor(f"{name}/master").bfloat16(), run.tensor(name)), name
        for moment in MOMENTS:  # the same steps were made under ZeRO 1, with other roundings
            found, expected = run.tensor(f"{name}/{moment}"), saved["zero1_bf16"].states[f"{name}/{moment}"]
            assert (found - expected).norm() <= 0.02 * expected.norm(), f"{name} {moment}"


def rewritten(saved, target, change, pattern="*optim_states.pt"):
    """A copy of a checkpoint with files changed."""
    shutil.copytree(saved.folder, target)
    for path in target.glob(pattern):
        content = torch.load(path, weights_only=False)
        change(content)
        path.unlink()
        torch.save(content, path)
    return UpstreamRun(target)


def test_partitions_of_before_deepspeed_wrote_down_what_is_in_them(saved, tmp_path):
    run = rewritten(
        saved["zero2_fp16"], tmp_path / "old", lambda c: c["optimizer_state_dict"].pop("param_slice_mappings")
    )
    assert_same_run(run, UpstreamRun(saved["zero2_fp16"].folder))


def test_elastic_checkpoints_are_read(saved, tmp_path):
    def change(content):
        state = content["optimizer_state_dict"]
        base = state["base_optimizer_state"]
        state["base_optimizer_state"] = [base["state"][number] for number in sorted(base["state"])]

    run = rewritten(saved["zero1_bf16"], tmp_path / "elastic", change)
    assert_same_run(run, UpstreamRun(saved["zero1_bf16"].folder))


def test_masters_in_one_vector_for_each_group(saved, tmp_path):
    """The form of DeepSpeed's fp16 optimizer around a fused Adam, which is there on GPUs only."""

    def change(content):
        saved, flat = content["optimizer"], torch._utils._flatten_dense_tensors
        masters, inner = saved.pop("fp32_groups"), saved["optimizer_state_dict"]
        saved["fp32_groups_flat"] = [flat([master.data for master in group]) for group in masters]
        groups = [group["params"] for group in inner["param_groups"]]
        states = inner["state"]
        inner["state"] = {
            number: {moment: flat([states[n][moment] for n in group]) for moment in MOMENTS} | {"step": 3}
            for number, group in enumerate(groups)
        }
        for number, group in enumerate(inner["param_groups"]):
            group["params"] = [number]

    run = rewritten(saved["fp16"], tmp_path / "fused", change, "mp_rank_*")
    assert_same_run(run, UpstreamRun(saved["fp16"].folder))


def test_fused_adam_counts_steps_on_one_parameter_only(tmp_path):
    def change(content):
        states = content["optimizer"]["state"]
        for number in list(states)[:-1]:
            states[number]["step"] = 0

    source = upstream_runs.Saved(GOLDENS / "seq" / "global_step4", {}, {})
    assert rewritten(source, tmp_path / "seq", change, "mp_rank_*").manifest.progress.optimizer_step == 4


def test_tensor_ranks_under_zero_are_joined(tmp_path):
    cases = {"zero1": zero(1) | BF16, "zero3": zero(3, stage3_param_persistence_threshold=100)}
    ranks = run_ranks(upstream_runs.save_divided, 2, tmp_path, cases)
    logical = weight_map(upstream_runs.DIVIDED.model)
    for case in cases:
        run = UpstreamRun(ranks[0][case].folder, hints=Hints(gpt_j_residual=False))
        assert run.manifest.layout == Layout(1, 1, 2, int(case[-1]))
        first, second = (rank[case].states for rank in ranks)
        assert {key for key in run.manifest.tensors if "/" in key} == set(first)
        for key in first:
            tensor = logical[key.partition("/")[0]]
            shards, shape = [first[key], second[key]], tensor.shape
            assert torch.equal(run.tensor(key), join_shards(tensor.name, shards, shape=shape, groups=tensor.groups)), (
                key
            )


def test_moments_of_biases_that_add_up_are_those_of_one_rank():
    first, second = (load_torch_file(path)["module"] for path in sorted((GOLDENS / "seq_tp2").glob("*/mp_rank_*")))
    run = UpstreamRun(GOLDENS / "seq_tp2" / "global_step3")
    name = "sequential.2.mlp.linear2.bias"
    assert torch.equal(run.tensor(canonical(name)), first[name] + second[name])
    optimizer = load_torch_file(run.folder / "mp_rank_01_model_states.pt")["optimizer"]
    found = run.tensor(f"{canonical(name)}/exp_avg")
    assert any(torch.equal(found, state["exp_avg"]) for state in optimizer["state"].values())


def test_two_stages_with_a_tied_head_under_zero(tmp_path):
    stages = run_ranks(upstream_runs.save_pipeline, 2, tmp_path, zero(1) | BF16)
    run = UpstreamRun(stages[0].folder)
    assert run.manifest.layout == Layout(2, 1, 1, 1)
    expected = stages[1].states | stages[0].states
    assert {key for key in run.manifest.tensors if "/" in key} == set(expected)
    for key, value in expected.items():
        assert torch.equal(run.tensor(key), value), key


@pytest.mark.parametrize(
    ("case", "missing", "told"),
    [
        ("zero1_bf16", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "no such file"),
        ("zero3_bf16", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "no such file"),
        ("zero3_bf16", "zero_pp_rank_0_mp_rank_00_model_states.pt", "no such file"),
    ],
)
def test_missing_files_are_named(saved, tmp_path, case, missing, told):
    shutil.copytree(saved[case].folder, tmp_path / "cut")
    (tmp_path / "cut" / missing).unlink()
    with pytest.raises(CheckpointError, match=f"{missing}: {told}") as raised:
        UpstreamRun(tmp_path / "cut")
    assert "\n" not in str(raised.value)


def test_a_missing_stage_is_named(tmp_path):
    shutil.copytree(GOLDENS / "pipe_pp2_tied" / "global_step3", tmp_path / "cut")
    (tmp_path / "cut" / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_01_model_states\.pt: no such file"):
        UpstreamRun(tmp_path / "cut")


def test_state_that_does_not_fit_is_refused(saved, tmp_path):
    def drop(content):
        content["optimizer"]["param_groups"][0]["params"].pop()

    source = upstream_runs.Saved(GOLDENS / "seq" / "global_step4", {}, {})
    with pytest.raises(CheckpointError, match="does not cover its parameters; set no_load_optim: true"):
        rewritten(source, tmp_path / "plain", drop, "mp_rank_*")

    def rename(content):
        state = content["optimizer_state_dict"]
        state["local_sub_partitions_of_fp32_groups"] = state.pop("single_partition_of_fp32_groups")

    with pytest.raises(CheckpointError, match=r"DeepSpeed before 0\.5"):
        rewritten(saved["zero2_fp16"], tmp_path / "ancient", rename)

    def shorten(content):
        vectors = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        vectors[0] = vectors[0][:-5].clone()

    with pytest.raises(CheckpointError, match=r"does not fit parameter layers\.|does not fit parameter sequential\."):
        rewritten(saved["zero2_fp16"], tmp_path / "short", shorten)


def test_state_of_some_groups_alone_is_not_passed_over():
    """Fresh moments would take its place without a word."""
    moments = {"exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4), "step": 3}
    inner = {"state": {0: moments}, "param_groups": [{"params": [0]}, {"params": [1]}]}
    saved = {"fp32_groups_flat": [torch.zeros(4), torch.zeros(4)], "optimizer_state_dict": inner}
    groups = [{name: torch.Size([4])} for name in ("layers.2.a", "layers.2.b")]
    with pytest.raises(CheckpointError, match="its optimizer state is that of 1 of 2 groups; set no_load_optim: true"):
        plain_states(saved, groups, "file")
    inner["state"] = {}
    assert plain_states(saved, groups, "file").states.keys() == {"master"}
