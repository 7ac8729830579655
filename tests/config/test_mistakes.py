"""Mistakes of a user, from the file to the line that is told; and what is asked for without a mistake."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from config.config_samples import sample

from neox.config import Config, config_from_dict, deepspeed_dict, load_config
from neox.config.__main__ import main
from neox.config.show import rows
from neox.errors import ConfigError

ROTARY = {"pos_emb": "rotary"}
FP16 = {"enabled": True}
CURRICULUM = {
    "enabled": True,
    "min_difficulty": 8,
    "max_difficulty": 32,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 8},
}


def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], *words: str) -> list[str]:
    """What `check` says about a file with one key a line, after the status is seen to be right."""
    path = tmp_path / "run.yml"
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in sample(**changes).items()))
    status = main(["check", str(path), *words])
    said = capsys.readouterr()
    assert status == (2 if said.err else 0)
    return (said.err or said.out).replace(str(path), "F").splitlines()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            ROTARY | {"rope_scaling": {"rope_type": ["linear"], "factor": 2}},
            "F:10: rope_scaling.rope_type: ['linear'] is unknown",
        ),
        (
            ROTARY | {"rope_scaling": {"rope_type": "linear", "factor": "8"}},
            "F:10: rope_scaling.factor: expected a number of 1 or more, got '8'; write 8",
        ),
        (
            ROTARY | {"rope_scaling": {"rope_type": "default"}},
            "F:10: rope_scaling.rope_type: 'default' is unknown; supported: linear, dynamic, yarn, llama3; "
            "remove rope_scaling",
        ),
        ({"HIDDEN": 3}, "F:9: HIDDEN: unknown key; did you mean 'hidden_size'?"),
        ({"activation": "GELU"}, "F:9: activation: 'GELU' is unknown; did you mean 'gelu'?; supported: 'gelu', "),
        ({"attention_config": [[["flashy"], 4]]}, "F:9: attention_config: 'flashy' is unknown; did you mean 'flash'?"),
        ({"attention_config": [[["mamba"], 4]]}, "F:9: attention_config: 'mamba' is not supported yet; "),
        (
            {"optimizer": {"type": "Adamm", "params": {"lr": 1e-3}}},
            "F:6: optimizer.type: 'adamm' is unknown; did you mean 'adam'?; supported: ",
        ),
        ({"lora": 8}, "F:9: lora: expected a mapping with targets, rank, dropout and alpha, got 8"),
        # The key that is wrong was not set, and the one that makes it so was.
        (
            {"lr_decay_style": "wsd", "warmup": 0.95},
            "F:10: warmup: 0.95 and wsd_decay_fraction 0.1 are more than the whole; lower one",
        ),
        (
            {"hidden_size": 63, "num_attention_heads": 3, "expansion_factor": 2.03, "model_parallel_size": 3},
            "F:10: intermediate_size: 127 is not divisible by model_parallel_size 3; change one of them",
        ),
        (
            {"time_limit": "12h"},
            "F:9: time_limit: expected a number of seconds, H:MM:SS or D-HH:MM:SS, got '12h'",
        ),
        ({"distributed_timeout": 1e10}, "F:9: distributed_timeout: expected at most 86400, got 10000000000.0"),
        ({"fp16": FP16 | {"loss_scale": "abc"}}, "F:9: fp16.loss_scale: expected a number, got 'abc'"),
        ({"fp16": FP16 | {"hysteresis": "2"}}, "F:9: fp16.hysteresis: expected an integer, got '2'; write 2"),
        ({"fp16": FP16 | {"loss_scale": -1}}, "F:9: fp16.loss_scale: expected at least 0, got -1"),
        ({"fp16": FP16 | {"loss_scale_window": 0}}, "F:9: fp16.loss_scale_window: expected more than 0, got 0"),
        (
            {"fp16": FP16 | {"type": "fp32"}},
            "F:9: fp16.type: 'fp32' contradicts fp16, which is what runs; remove it or change the section",
        ),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": -5}},
            "F:9: zero_optimization.reduce_bucket_size: expected more than 0, got -5",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 2}}},
            "F:9: zero_optimization.offload_optimizer.ratio: expected 0 to 1, got 2",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/drive"}}},
            "F:9: zero_optimization.offload_optimizer.device: 'nvme' needs stage 3, got 2; set device: ",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "F:9: zero_optimization.offload_param.nvme_path: not set, and device is nvme; add ",
        ),
        (
            {"deepspeed_extra_args": {"zero_optimization": {"overlap_com": True}}},
            "F:9: deepspeed_extra_args.zero_optimization.overlap_com: unknown key; did you mean 'overlap_comm'?",
        ),
        ({"pipe_partition_method": "type:("}, "F:9: pipe_partition_method: '(' is no regular expression: "),
        (
            {"pipe_parallel_size": 2, "pipe_partition_method": "type:gmlp"},
            "F:10: pipe_partition_method: 'gmlp' matches no layer; match one of Embedding, TransformerBlock, ",
        ),
        (
            {"include": "a", "exclude": "b", "hostfile": "hosts"},
            "F:10: exclude: 'b' is set together with include 'a'; keep one of them",
        ),
        ({"include": "a"}, "F:9: include: chooses among the hosts of a hostfile, and there is none; set hostfile"),
        (
            {"curriculum_learning": {"min_difficulty": 8}},
            "F:9: curriculum_learning.enabled: not set; add enabled: true or enabled: false",
        ),
        (
            {"optimizer": {"type": "ZeroOneAdam", "params": {"lr": 1e-3, "var_freeze_step": 100}}},
            "F:6: optimizer.type: 'zerooneadam' is gone from DeepSpeed; set type: Adam, and to send fewer bytes ",
        ),
        (
            {"curriculum_learning": CURRICULUM},
            "F:9: curriculum_learning.curriculum_type: expected 'seqlen', and it is not set; add it",
        ),
        ({"seed": "007"}, "F:9: seed: expected an integer, got '007'; write 7"),
        ({"n_embd": 64}, "F:9: n_embd: unknown key; did you mean 'hidden_size'?"),
        ({"tie_word_embeddings": True}, "F:9: tie_word_embeddings: unknown key; did you mean 'no_weight_tying'?"),
        ({"flops_profiler": {"profile_step": 1}}, "F:9: flops_profiler.enabled: not set; add enabled: true or "),
    ],
)
def test_one_line_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], line: str
) -> None:
    said = check(tmp_path, capsys, changes)
    assert len(said) == 1
    assert said[0].startswith(line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["optimizer.params.betas=[0.9"], "command line: optimizer.params.betas=[0.9: not valid YAML: "),
        (
            ["deepspeed_extra_args={train_batch_size: 3}", "--world-size", "1"],
            "command line: deepspeed_extra_args.trai",
        ),
    ],
)
def test_one_line_about_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    said = check(tmp_path, capsys, {}, *words)
    assert len(said) == 1
    assert said[0].startswith(line)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; name a file in it"):
        load_config([tmp_path])


@pytest.mark.parametrize(
    ("changes", "notice"),
    [
        ({"pos_emb": "learned", "rotary_emb_base": 500000}, "rotary_emb_base has no effect: pos_emb is learned"),
        ({"sequence_parallel": True}, "sequence_parallel has no effect: model_parallel_size is 1"),
        (
            {"weighted_sampler_alpha": 0.5},
            "weighted_sampler_alpha has no effect: weight_by_num_documents is not set",
        ),
    ],
)
def test_what_another_key_makes_idle_is_announced(changes: dict[str, Any], notice: str) -> None:
    assert config_from_dict(sample(**changes)).notices == (notice,)


@pytest.mark.parametrize("section", ["fp16", "bf16"])
def test_what_upstream_carries_inside_a_precision_is_announced_and_left_out(section: str) -> None:
    # RWKV's file has the whole of fp16 under the name bf16.
    leftovers = {section: True, "type": section}
    if section == "bf16":
        leftovers |= {
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 12,
            "hysteresis": 2,
            "min_loss_scale": 1,
        }
    config = config_from_dict(sample(**{section: {"enabled": True, **leftovers}, "zero_optimization": {"stage": 1}}))
    assert [notice.partition(" ")[0] for notice in config.notices] == [f"{section}.{key}" for key in leftovers]
    assert deepspeed_dict(config)[section] == {"enabled": True}


def test_null_inside_a_mapping_is_the_same_as_absent(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    changes = {
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": None, "eps": 1e-6}},
        "zero_optimization": {"stage": None, "overlap_comm": True, "offload_param": None},
        "lora": {"rank": None},
    }
    path.write_text(json.dumps(sample(**changes)))
    config = load_config([path], overrides=["optimizer.params.eps=null"])
    assert config.optimizer.params == {"betas": [0.9, 0.999], "eps": 1e-8}
    assert config.parallel.zero_stage == 0
    assert config.deepspeed.zero_optimization == {"overlap_comm": True}
    assert not config.lora.is_on


def shown(config: Config, *, only_given: bool = False) -> dict[str, tuple[Any, str]]:
    return {row.key: (row.value, row.source) for row in rows(config, only_given=only_given)}


def test_show_tells_where_the_optimizers_own_keys_stand(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    optimizer = {"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.3}}
    path.write_text(json.dumps(sample(optimizer=optimizer), indent=0))
    lines = path.read_text().splitlines()
    found = shown(load_config([path]), only_given=True)
    for key, name, value in (("optimizer.params.lr", "lr", 1e-3), ("weight_decay", "weight_decay", 0.3)):
        line = next(number for number, text in enumerate(lines, start=1) if text.startswith(f'"{name}"'))
        assert found[key] == (value, f"{path}:{line}")


@pytest.mark.parametrize("changes", [{"precision": "bfloat16"}, {"precision": "fp32", "fp32_allreduce": True}, {}])
def test_show_tells_the_types_that_deepspeed_gets(changes: dict[str, Any]) -> None:
    config = config_from_dict(sample(**changes))
    told, found = deepspeed_dict(config), shown(config)
    assert told.get("communication_data_type") == found["communication_data_type"][0]
    types = told.get("data_types", {}).get("grad_accum_dtype")
    assert types == found.get("data_types.grad_accum_dtype", (None, ""))[0]
    assert (types == "fp32") is (changes.get("precision") == "bfloat16")


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("train_iters", "train_iters: training needs a length; set train_iters or train_epochs"),
        ("data_path", "data_path: training needs data; set data_path, or train_, valid_ and test_data_paths"),
        ("train_micro_batch_size_per_gpu", "train_batch_size: training needs a batch; set it or train_micro_batch"),
        ("optimizer", "optimizer: training needs one; add optimizer: {type: Adam, params: {lr: 6.0e-4}}"),
    ],
)
def test_training_does_not_start_without_what_it_needs(
    missing: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    script = importlib.util.spec_from_file_location("train_script", Path(__file__).parents[2] / "train.py")
    assert script is not None
    assert script.loader is not None
    train = importlib.util.module_from_spec(script)
    script.loader.exec_module(train)
    path = tmp_path / "run.yml"
    path.write_text(json.dumps(sample(padded_vocab_size=128, **{missing: None})))
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}[^\n]*$"):
        train.main([str(path)])


def test_fp16_without_a_gpu_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from neox.training import preflight

    monkeypatch.setattr(preflight, "cuda_device_count", lambda: 0)
    monkeypatch.setattr(preflight, "get_accelerator", lambda: SimpleNamespace(is_fp16_supported=lambda: False))
    config = config_from_dict(sample(fp16={"enabled": True}, padded_vocab_size=128))
    with pytest.raises(
        ConfigError, match=r"^precision: fp16 needs a GPU, .* add fp16.enabled=false precision=bfloat16$"
    ):
        preflight.prepare(config)


def test_names_of_layers_are_those_of_the_pipeline() -> None:
    from neox.config.resolve_parallel import LAYER_CLASSES

    source = (Path(__file__).parents[2] / "neox" / "training" / "pipeline.py").read_text()
    assert all(f'"{name}"' in source for name in LAYER_CLASSES)


def test_evaluation_alone_has_a_schedule() -> None:
    assert config_from_dict(sample(train_iters=0)).schedule.lr_decay_iters == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nonsense"], "python -m neox.config: argument command: "),
        (["check", "a.yml", "-train_iters=5"], "python -m neox.config: unrecognized arguments: -train_iters=5; see "),
        (["check", "a.yml", "--world-size", "x"], "python -m neox.config check: argument --world-size: "),
        (["check", "x" * 300], f"{'x' * 300}: cannot be used ("),
        (["check", "/dev/null"], "/dev/null: not a regular file; save what it gives to one"),
    ],
    ids=["command", "flag", "number", "long name", "device"],
)
def test_a_command_line_that_is_wrong_is_one_line(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(line)
    assert said.err.count("\n") == 1


def test_an_interrupted_command_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("neox.config.__main__.resolve_config_paths", interrupted)
    assert main(["check", "a.yml"]) == 130
    assert capsys.readouterr() == ("", "")
