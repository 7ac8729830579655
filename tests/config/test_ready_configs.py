"""The files of configs/, the command line, and what loading costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from neox.config import check_training, deepspeed_dict, load_config
from neox.config.__main__ import main as config_command
from neox.config.config import Config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SETUP = CONFIGS / "local_setup.yml"

OVERLAYS = ("local_setup", "lora", "dpo")
"""Files that are added to that of a model."""

NAMES = sorted(
    name for p in CONFIGS.rglob("*.yml") if (name := str(p.relative_to(CONFIGS).with_suffix(""))) not in OVERLAYS
)

TRAINED_ON = {"pythia/410M": 32, "pythia/1.4B": 64, "pythia/6.9B": 128, "pythia/12B": 256, "20B": 96}
"""GPUs that the released models were trained on."""


def ready(name: str) -> Config:
    files = [CONFIGS / f"{name}.yml"] + ([] if name == "local_cpu" else [SETUP])
    return load_config(files)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_ready_to_train(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = ready(name)
    files = [str(CONFIGS / f"{name}.yml")] + ([] if name == "local_cpu" else [str(SETUP)])
    assert config_command(["check", *files]) == 0
    assert capsys.readouterr().err == ""
    check_training(config)
    assert not [notice for notice in config.notices if "no effect" in notice]
    assert (CONFIGS / f"{name}.yml").read_text().startswith("# ")
    cell = config.parallel.pipeline_stages * config.parallel.model_parallel_size
    resolved = config.with_world_size(cell)
    assert deepspeed_dict(resolved)["train_batch_size"] == config.batch.train_batch_size


def published() -> dict[str, tuple[int, str, str]]:
    """Rows of the table in docs/models.md: name -> count, published count, why they differ."""
    rows = {}
    for line in (ROOT / "docs" / "models.md").read_text().splitlines():
        if line.startswith("| `configs/"):
            file, count, claim, note = (cell.strip() for cell in line.strip("|").split("|"))
            rows[file.removeprefix("`configs/").removesuffix(".yml`")] = (number(count), claim, note)
    return rows


def number(text: str) -> int:
    """6,738,415,616 or 6.7B."""
    unit = {"M": 10**6, "B": 10**9}.get(text[-1])
    return round(float(text[:-1]) * unit) if unit else int(text.replace(",", ""))


def test_the_table_of_models_is_whole() -> None:
    """Every model has its row, with the counts that everybody knows."""
    assert sorted(published()) == sorted(name for name in NAMES if name not in ("small", "local_cpu", "quickstart"))
    counts = {name: count for name, (count, _, _) in published().items()}
    assert counts["llama/7B"] == 6_738_415_616
    assert counts["llama/13B"] == 13_015_864_320
    assert counts["mistral/7B"] == 7_241_732_096
    assert counts["mixtral/8x7B"] == 46_702_792_704
    assert counts["llama3/8B"] == 8_030_261_248
    assert counts["bloom/176B"] == 176_247_271_424
    assert counts["20B"] == 20_554_567_680


@pytest.mark.parametrize("name", published())
def test_parameter_counts(name: str) -> None:
    """On the meta device: what the table says, what the file says, and what was published."""
    from neox.model.count import count_parameters

    count, claim, note = published()[name]
    config = ready(name)
    assert config.model.padded_vocab_size is not None, "the vocabulary must not depend on the tokenizer"
    assert count_parameters(config.model).total == count
    assert f"{count:,} parameters" in (CONFIGS / f"{name}.yml").read_text()
    assert number(claim) == count or note, "say in the table why the counts differ"
    assert number(claim) == pytest.approx(count, rel=0.045)


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "llama2": "LlamaForCausalLM",
    "llama3": "LlamaForCausalLM",
    "codellama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "falcon": "FalconForCausalLM",
    "opt": "OPTForCausalLM",
    "bloom": "BloomForCausalLM",
    "pythia": "GPTNeoXForCausalLM",
    ".": "GPT2LMHeadModel",
}


@pytest.mark.parametrize("folder", ARCHITECTURES)
def test_models_are_what_the_released_config_json_says(folder: str) -> None:
    """The class, and the widths that releases name."""
    from neox.checkpoint.huggingface import family_of

    names = [name for name in published() if (name if "/" in name else f"./{name}").startswith(f"{folder}/")]
    for name in names:
        model = ready(name).model
        content = family_of(model).config_json(model, dtype="bfloat16", tokens={})
        assert content["architectures"] == ["GPTNeoXForCausalLM" if name == "20B" else ARCHITECTURES[folder]]
        for key, value in RELEASED.get(name, {}).items():
            assert content[key] == value, (name, key)


RELEASED: dict[str, dict[str, object]] = {
    "llama/7B": {"intermediate_size": 11008, "rms_norm_eps": 1e-6},
    "llama/65B": {"intermediate_size": 22016},
    "llama2/70B": {"intermediate_size": 28672, "num_key_value_heads": 8, "max_position_embeddings": 4096},
    "llama3/8B": {"intermediate_size": 14336, "vocab_size": 128256, "rope_theta": 500000.0},
    "llama3/3.2-1B": {"intermediate_size": 8192, "head_dim": 64, "tie_word_embeddings": True},
    "codellama/7B": {"vocab_size": 32016, "rope_theta": 1000000.0, "max_position_embeddings": 16384},
    "mistral/7B": {"sliding_window": 4096, "max_position_embeddings": 32768, "num_key_value_heads": 8},
    "mixtral/8x7B": {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02, "head_dim": 128},
    "falcon/7B": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False},
    "falcon/40B": {"new_decoder_architecture": True, "num_kv_heads": 8, "num_ln_in_parallel_attn": 2},
    "opt/125M": {"max_position_embeddings": 2048, "ffn_dim": 3072, "activation_function": "relu"},
    "bloom/176B": {"n_layer": 70, "n_head": 112, "vocab_size": 250880},
}


@pytest.mark.parametrize(("name", "gpus"), TRAINED_ON.items())
def test_batches_as_trained(name: str, gpus: int) -> None:
    config = ready(name).with_world_size(gpus)
    sequences = 1536 if name == "20B" else 1024
    assert config.batch.train_batch_size == sequences
    steps = {"20B": 32, "pythia/6.9B": 2, "pythia/12B": 2}.get(name, 1)
    assert config.batch.gradient_accumulation_steps == steps
    assert config.schedule.min_lr == pytest.approx(config.optimizer.lr / 10)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "neox.config", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_check_succeeds() -> None:
    done = command("check", "-d", "configs", "pythia/70M", "local_setup", "train_iters=5", "--world-size", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "valid: configs/pythia/70M.yml, configs/local_setup.yml\n"


def test_check_prints_mistakes_and_exits_2(tmp_path: Path) -> None:
    path = tmp_path / "bad.yml"
    path.write_text("num_layers: two\nhidden_sizes: 4\n")
    done = command("check", str(path))
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert f"{path}:1: num_layers: expected an integer, got 'two'" in lines
    assert f"{path}:2: hidden_sizes: unknown key; did you mean 'hidden_size'?" in lines
    assert command("check", "absent").returncode == 2
    assert "Traceback" not in done.stderr


def test_layouts_prints_the_table() -> None:
    done = command("layouts")
    assert done.returncode == 0
    assert done.stdout.startswith("# Legal layouts")


def test_loading_is_fast_and_imports_no_torch() -> None:
    load = (
        "import sys\n"
        "from neox.config import load_config\n"
        "load_config(['configs/pythia/70M.yml', 'configs/local_setup.yml'])\n"
        "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)\n"
    )
    # It takes twice the processor time of an import of numpy, 0.2 s, on whatever machine.
    ours, numpy = min(map(processor_time, [load] * 3)), min(map(processor_time, ["import numpy\n"] * 3))
    assert ours < 5 * numpy, f"loading took {ours:.2f} s of processor time, and numpy's import {numpy:.2f} s"


def processor_time(code: str) -> float:
    told = "import resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_utime)\n"
    command = [sys.executable, "-c", code + told]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
