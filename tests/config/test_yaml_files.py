"""Reading YAML: numbers, places, merging, overrides and the errors of each."""

from pathlib import Path

import pytest

from neox.config import load_config, resolve_config_paths
from neox.errors import ConfigError

MODEL = """# a comment
{
  "num-layers": 2, "hidden_size": 64,   # two on one line
  "num-attention-heads": 4,
  "seq-length": 32,
  "optimizer": {
    "type": "Adam",
    "params": {"lr": 3e-4, "betas": [0.9, .95], "eps": 1e-8,},
  },
}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return write(tmp_path, "model.yml", MODEL)


def failure(*files: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(files, overrides=overrides)
    return str(error.value).splitlines()


def test_json_like_file_with_comments_hyphens_and_trailing_commas(model_file: Path) -> None:
    config = load_config([model_file])
    assert config.model.num_layers == 2
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.params == {"betas": [0.9, 0.95], "eps": 1e-8}
    assert config.sources["num_layers"] == f"{model_file}:3"
    assert config.sources["optimizer.params.eps"] == f"{model_file}:8"
    assert config.sources["weight_decay"] == "default"
    assert config.files == {"model.yml": MODEL}


def test_block_style_and_plain_numbers(tmp_path: Path) -> None:
    text = "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 32\n"
    text += "layernorm_epsilon: 1e-6\nmin_lr: 0\ntrain_iters: 1e5\nwarmup: .5\nsplit: 949,50,1\ncomment: 12:30\n"
    config = load_config([write(tmp_path, "block.yml", text)])
    assert config.model.layernorm_epsilon == 1e-6
    assert config.training.train_iters == 100_000
    assert config.schedule.warmup == 0.5
    assert config.data.split == "949,50,1"
    assert config.launch.comment == "12:30"


def test_quoted_number_for_a_float(model_file: Path, tmp_path: Path) -> None:
    extra = write(tmp_path, "extra.yml", '{"layernorm_epsilon": "1e-8"}')
    assert load_config([model_file, extra]).model.layernorm_epsilon == 1e-8


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train_iters: abc", "train_iters: expected an integer, got 'abc'"),
        ("train_iters: '12'", "train_iters: expected an integer, got '12'; write 12"),
        ("min_lr: 1.0e_8", "min_lr: expected a number, got '1.0e_8'; write 1.0e-8"),
        ("min_lr: 3e-4f", "min_lr: expected a number, got '3e-4f'; write it like 1.5, 3e-4 or 1000"),
        ("train_iters: 1_000e5x", "train_iters: expected an integer, got '1_000e5x'; write it like 1.5, 3e-4 or 1000"),
        ("min_lr: .inf", "min_lr: expected a finite number, got inf"),
        ("train_iters: !!int abc", "train_iters: 'abc' is no int"),
        ("save: !env SAVE", "save: tag !env means nothing here; remove it"),
        ("optimizer: !merge {type: Adam}", "optimizer: tag !merge means nothing here; remove it"),
        ("extra_save_iters: !!set {1, 2}", "extra_save_iters: tag tag:yaml.org,2002:set means nothing here; remove it"),
        ("hysteresis: 2x", "hysteresis: expected an integer, got '2x'; write it like 1.5, 3e-4 or 1000"),
        ("train_iters: true", "train_iters: expected an integer, got True"),
        ("train_iters: 1.5", "train_iters: expected an integer, got 1.5"),
        ("min_lr: yes", "min_lr: expected a number, got True"),
        ("finetune: 1", "finetune: expected true or false, got 1"),
        ("save: 3", "save: expected text, got 3"),
        ("zero_optimization: 1", "zero_optimization: expected a mapping, got 1"),
        ("warmup: 3", "warmup: expected at most 1, got 3"),
        ("seed: 0", "seed: expected more than 0, got 0"),
        ("train_data_weights: [a]", "train_data_weights: expected a number, got 'a' in ['a']"),
        ("optimizer: Adam", "optimizer: expected a mapping with type and params, got 'Adam'"),
        ("optimizer: {type: Adam, lr: 1}", "optimizer.lr: unknown key; remove it or move it into params"),
        ("deepspeed: false", "deepspeed: expected True, got False"),
    ],
)
def test_type_errors_name_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    path = write(tmp_path, "typed.yml", f"# first\nnum_layers: 2\n{line}\n")
    assert f"{path}:3: {expected}" in failure(path)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("num_layer", "num_layers"),
        ("hiden-size", "hidden_size"),
        ("save_interval", "checkpoint_factor"),
        ("warmup_iters", "warmup"),
        ("decay_lr_to", "min_lr"),
        ("attention_type", "attention_config"),
        ("autotuning_config", "autotuning"),
        ("gas", "gradient_accumulation_steps"),
    ],
)
def test_unknown_key_names_the_nearest(model_file: Path, tmp_path: Path, key: str, near: str) -> None:
    path = write(tmp_path, "more.yml", f"\n{key}: 1\n")
    spelt = key.replace("-", "_")
    assert failure(model_file, path) == [f"{path}:2: {spelt}: unknown key; did you mean {near!r}?"]


def test_all_mistakes_are_told_at_once(model_file: Path, tmp_path: Path) -> None:
    text = "nonsense: 1\ntrain_iters: x\nlr_decay_style: fish\nrpe_num_buckets: 8\nnum_kv_heads: 3\nsave: here\n"
    path = write(tmp_path, "bad.yml", text)
    other = write(tmp_path, "other.yml", "min_lr: 1\nhidden_size: 65\nnum_layers: 2\n")
    lines = failure(model_file, path, other, overrides=("bf16.enabled=true", "precision=fp16"))
    assert sorted(lines) == sorted([
        f"{path}:1: nonsense: unknown key; remove it",
        f"{path}:2: train_iters: expected an integer, got 'x'",
        f"{path}:3: lr_decay_style: 'fish' is unknown; supported: 'constant', 'linear', 'cosine', 'exponential', "
        "'inverse_sqrt' or 'wsd'",
        f"{path}:4: rpe_num_buckets: 8 is not supported yet (Buckets of relative positions); remove the key or set it "
        "to 32",
        f"{path}:5: num_kv_heads: num_attention_heads 4 is not divisible by 3; nearest that works: 2",
        f"{path}:6: save: set without checkpoint_factor or extra_save_iters; add checkpoint_factor: 1000",
        f"{other}:1: min_lr: 1 is above optimizer.params.lr 0.0003; lower it",
        f"{other}:2: hidden_size: set to 65 here and to 64 at {model_file}:3; keep one of them, "
        "or let this file win with --override",
        "command line: bf16.enabled: contradicts precision 'fp16'; set precision: bfloat16",
    ])  # fmt: skip


def test_a_rule_ends_where_it_reads_a_wrong_value(tmp_path: Path) -> None:
    """What else is wrong is told; nothing is told that follows from the wrong value."""
    text = "num_layers: 2\nhidden_size: wide\nnum_attention_heads: 4\nseq_length: 32\nmodel_parallel_size: 3\n"
    path = write(
        tmp_path, "a.yml", text + "optimizer: {type: Adam, params: {lr: -1}}\ndata_path: a\ntest_data_paths: [b]\n"
    )
    assert failure(path) == [
        f"{path}:2: hidden_size: expected an integer, got 'wide'",
        f"{path}:6: optimizer.params.lr: expected a finite number, at least 0, got -1",
        f"{path}:7: data_path: set together with test_data_paths; keep one of them",
    ]


def test_key_in_two_files(model_file: Path, tmp_path: Path) -> None:
    same = write(tmp_path, "same.yml", "num_layers: 2\n")
    assert load_config([model_file, same]).model.num_layers == 2
    other = write(tmp_path, "other.yml", "\n\nnum_layers: 3\n")
    lines = failure(model_file, other)
    mend = "keep one of them, or let this file win with --override"
    assert lines == [f"{other}:3: num_layers: set to 3 here and to 2 at {model_file}:3; {mend}"]
    config = load_config([model_file, other], overrides=["num-layers=5"])
    assert config.model.num_layers == 5
    assert config.sources["num_layers"] == "command line"


def test_key_twice_in_one_file(tmp_path: Path) -> None:
    path = write(tmp_path, "twice.yml", MODEL.replace('"seq-length": 32,', '"seq-length": 32,\n"seq_length": 32,'))
    assert load_config([path]).model.seq_length == 32
    path = write(tmp_path, "twice.yml", MODEL.replace('"seq-length": 32,', '"seq-length": 32,\n"seq_length": 64,'))
    assert failure(path) == [f"{path}:6: seq_length: already set at {path}:5; keep one of them"]
    path = write(tmp_path, "inner.yml", MODEL.replace('"lr": 3e-4,', '"lr": 3e-4, "lr": 4e-4,'))
    assert failure(path) == [f"{path}:8: optimizer.params.lr: already set at {path}:8; keep one of them"]


def test_overrides(model_file: Path) -> None:
    config = load_config(
        [model_file],
        overrides=[
            "optimizer.params.lr=1e-2",
            "zero_optimization.stage=1",
            "extra_save_iters=[1, 2]",
            "save=a=b",
        ],
    )
    assert config.optimizer.lr == 1e-2
    assert config.optimizer.params["betas"] == [0.9, 0.95]
    assert config.parallel.zero_stage == 1
    assert config.checkpoint.save == "a=b"
    assert config.checkpoint.extra_save_iters == (1, 2)
    assert config.sources["optimizer.params.lr"] == "command line"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_layers", "command line: 'num_layers': write an override as key=value"),
        ("num_layers.x=1", "command line: num_layers.x: num_layers is not a mapping"),
        ("num_layers=two", "command line: num_layers: expected an integer, got 'two'"),
        ("num_layrs=2", "command line: num_layrs: unknown key; did you mean 'num_layers'?"),
        ("save=[1", "not valid YAML"),
        ("save=\udcff", "not UTF-8 text; write it in UTF-8"),
        ('eval_results_prefix="a\\0b"', "has a NUL character; remove it"),
    ],
)
def test_wrong_overrides(model_file: Path, override: str, message: str) -> None:
    lines = failure(model_file, overrides=(override,))
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{num_layers: 2,\n hidden_size: [1, 2\n", ":3: not valid YAML"),
        ("- num_layers\n", ":1: expected a mapping of keys to values at the top"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "broken.yml", text)
    lines = failure(path)
    assert len(lines) == 1
    assert lines[0].startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 60 + "]" * 60, "nested too deeply"),
        ("a: " + "[" * 300_000, "nested too deeply"),
        ("a: &a [*a]\n", "nested too deeply"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
        ), "too many values"),
        ("? [a, b]\n: 1\n", "expected a key, got a list or mapping"),
        ("seed: " + "9" * 5000, "is no int"),
        ("seed: *nothing", "found undefined alias"),
    ],
    ids=["deep", "deeper", "endless", "explosive", "odd key", "digits", "alias"],
)  # fmt: skip
def test_hostile_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "hostile.yml", text)
    lines = failure(path)
    assert [line for line in lines if message in line and line.startswith(str(path))]


BASE = "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 32\n"
OPTIMIZER = "optimizer: {type: Adam, params: {lr: 1e-3, betas: [0.9, 0.95]}}\nextra_save_iters: [1, 2]\n"


def test_override_files_replace_and_tell(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yml", BASE + OPTIMIZER + "seed: 7\n")
    one = write(
        tmp_path, "one.yml", "optimizer: {params: {lr: 1e-4, betas: null, eps: 1e-6}}\nnum-layers: 3\nseed: 7\n"
    )
    two = write(tmp_path, "two.yml", "num_layers: 4\nextra_save_iters: [3]\nweight_decay: 0\nseed: null\n")
    config = load_config([base], override_files=[one, two], overrides=["weight_decay=0.5"])
    assert config.optimizer.lr == 1e-4
    assert config.optimizer.params == {"betas": [0.9, 0.999], "eps": 1e-6}
    assert (config.model.num_layers, config.training.seed) == (4, 1234)
    assert config.checkpoint.extra_save_iters == (3,)
    assert config.optimizer.weight_decay == 0.5
    assert config.replaced == (
        f"optimizer.params.lr: 0.001 ({base}:5) -> 0.0001 ({one}:1)",
        f"optimizer.params.betas: [0.9, 0.95] ({base}:5) -> None ({one}:1)",
        f"num_layers: 2 ({base}:1) -> 3 ({one}:2)",
        f"num_layers: 3 ({one}:2) -> 4 ({two}:1)",
        f"extra_save_iters: [1, 2] ({base}:6) -> [3] ({two}:2)",
        f"seed: 7 ({one}:3) -> None ({two}:4)",
    )
    assert config.notices[: len(config.replaced)] == config.replaced
    assert config.with_world_size(2).notices[: len(config.replaced)] == config.replaced
    assert config.sources["optimizer.params.eps"] == f"{one}:1"
    assert config.sources["num_layers"] == f"{two}:1"
    assert set(config.files) == {"base.yml", "one.yml", "two.yml"}


def test_override_file_settles_a_contradiction(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yml", BASE)
    other = write(tmp_path, "other.yml", "num_layers: 3\n")
    over = write(tmp_path, "over.yml", "num_layers: 5\n")
    assert load_config([base, other], override_files=[over]).model.num_layers == 5
    with pytest.raises(ConfigError, match=r"over\.yml:1: num_layers: expected an integer, got 'x'"):
        load_config([base], override_files=[write(tmp_path, "over.yml", "num_layers: x\n")])


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.yml"
    path.write_bytes(b"\xff\xfe\x00")
    assert failure(path) == [f"{path}: cannot be read: not UTF-8 text"]


def test_paths_without_suffix_and_in_a_folder(model_file: Path) -> None:
    assert resolve_config_paths(["model"], model_file.parent) == [model_file]
    assert resolve_config_paths([model_file.with_suffix("")]) == [model_file]
    assert load_config([model_file.with_suffix("")]).model.num_layers == 2


def test_missing_file_names_the_nearest(model_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"modle: no such file; did you mean 'model'\?"):
        resolve_config_paths(["modle"], model_file.parent)
    with pytest.raises(ConfigError, match="no such file, and no folder"):
        resolve_config_paths(["model"], model_file.parent / "absent")


def test_size_such_as_1_4b_is_no_suffix(tmp_path: Path) -> None:
    path = write(tmp_path, "1.4B.yml", MODEL)
    assert resolve_config_paths(["1.4B"], tmp_path) == [path]
