import importlib.util
import json
from pathlib import Path

import pytest

from neox.config import config_from_dict, load_config
from neox.errors import DataError
from neox.model.count import count_parameters

ROOT = Path(__file__).resolve().parents[2]

# As published with the models, Black et al. 2022 (20B) and Biderman et al. 2023 (Pythia, table 1): total, and
# without embeddings (for 20B by its vocabulary and width).
PUBLISHED = {
    "20B": (20_554_567_680, 20_554_567_680 - 2 * 50_432 * 6_144),
    "pythia/70M": (70_426_624, 18_915_328),
    "pythia/160M": (162_322_944, 85_056_000),
    "pythia/410M": (405_334_016, 302_311_424),
    "pythia/1B": (1_011_781_632, 805_736_448),
    "pythia/1.4B": (1_414_647_808, 1_208_602_624),
    "pythia/2.8B": (2_775_208_960, 2_517_652_480),
    "pythia/6.9B": (6_857_302_016, 6_444_163_072),
    "pythia/12B": (11_846_072_320, 11_327_027_200),
}


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("count", ROOT / "tools" / "count_parameters.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("name", PUBLISHED)
def test_ready_configs_have_the_published_size(name):
    count = count_parameters(load_config([ROOT / "configs" / f"{name}.yml"]).model)
    assert (count.total, count.non_embedding) == PUBLISHED[name]
    assert sum(count.per_layer.values()) == count.total


def test_every_ready_model_can_be_counted(main, capsys):
    paths = [p for p in (ROOT / "configs").rglob("*.yml") if "padded_vocab_size" in p.read_text()]
    assert len(paths) >= len(PUBLISHED)
    for path in paths:
        main([str(path), "--json"])
        figures = json.loads(capsys.readouterr().out)
        assert figures["total"] == sum(figures["per_layer"].values()) > figures["non_embedding"] > 0


def test_counts_by_hand():
    shape = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16, "padded_vocab_size": 40}
    block = 4 * 8 + (3 * 8 * 8 + 3 * 8) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
    rest = shape | {"train_micro_batch_size_per_gpu": 1}
    learned = count_parameters(config_from_dict(rest).model)
    assert learned.per_layer == {0: 40 * 8 + 16 * 8, 2: block, 3: block, 5: 16}
    assert learned.non_embedding == 2 * block + 16
    rotary = count_parameters(config_from_dict(rest | {"pos_emb": "rotary", "no_weight_tying": True}).model)
    assert rotary.per_layer == {0: 320, 2: block, 3: block, 5: 16, 6: 320}
    assert rotary.non_embedding == 2 * block + 16


# Published numbers of parameters of the models' cards, by the shape and nothing else; the tests of the ready
# configurations count the same from files.
LLAMA = {"norm": "rmsnorm", "pos_emb": "rotary", "activation": "swiglu", "no_weight_tying": True}
LLAMA |= {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False}
FAMILIES = {
    "LLaMA-7B": (6_738_415_616, (32, 4096, 32, 32_000), LLAMA | {"intermediate_size": 3 * 11008}),
    "Mistral-7B": (7_241_732_096, (32, 4096, 32, 32_000), LLAMA | {"intermediate_size": 3 * 14336, "num_kv_heads": 8}),
    "Llama-3-8B": (8_030_261_248, (32, 4096, 32, 128_256), LLAMA | {"intermediate_size": 3 * 14336, "num_kv_heads": 8}),
    "BLOOM-560M": (559_214_592, (24, 1024, 16, 250_880), {"pos_emb": "alibi", "embedding_norm": True}),
    "OPT-1.3B": (
        1_315_758_080,
        (24, 2048, 32, 50_272),
        {"pos_emb": "learned", "opt_pos_emb_offset": 2, "activation": "relu"},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_have_the_published_size(name):
    total, shape, keys = FAMILIES[name]
    sizes = dict(zip(("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size"), shape, strict=True))
    rest = {"seq_length": 2048, "train_micro_batch_size_per_gpu": 1}
    assert count_parameters(config_from_dict(sizes | rest | keys).model).total == total


def test_an_embedding_norm_is_no_embedding():
    shape = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16, "padded_vocab_size": 40}
    shape |= {"train_micro_batch_size_per_gpu": 1}
    without = count_parameters(config_from_dict(shape).model)
    normed = count_parameters(config_from_dict(shape | {"embedding_norm": True}).model)
    assert normed.non_embedding == without.non_embedding + 16
    assert normed.per_layer[0] == without.per_layer[0] + 16
    # A norm without parameters, and one shared by both branches, take up nothing.
    bare = count_parameters(config_from_dict(shape | {"norm": "non_parametric_layernorm"}).model)
    assert bare.total == without.total - 5 * 16
    assert bare.per_layer.keys() == {0, 2, 3}
    shared = count_parameters(config_from_dict(shape | {"gpt_j_residual": True, "gpt_j_tied": True}).model)
    assert shared.total == without.total - 2 * 16


def test_table_and_overrides(main, capsys):
    main([str(ROOT / "configs/pythia/70M.yml"), "num_layers=2"])
    lines = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines() if "FLOPs" not in line)
    assert lines["total"] == f"{70_426_624 - 4 * 3_152_384:,}"
    assert lines["layer 2"] == lines["layer 3"] == "3,152,384"


def test_flops_are_six_per_parameter_and_attention(main, capsys):
    main([str(ROOT / "configs/pythia/70M.yml"), "--json"])
    figures = json.loads(capsys.readouterr().out)
    weights = figures["total"] - 50304 * 512  # the embedding is a look-up
    attention = 6 * 6 * 2 * 2048 * 512
    assert figures["train_flops_per_token"] == pytest.approx(6 * weights + attention, rel=2e-3)


def test_without_a_vocabulary_it_asks_for_the_tokenizer(main, tmp_path):
    path = tmp_path / "model.yml"
    path.write_text(json.dumps({"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8}))
    with pytest.raises(DataError, match="vocab_file"):
        main([str(path)])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_type": "CharLevelTokenizer"}))
    main([str(path)])
