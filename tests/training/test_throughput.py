"""FLOP counts against published formulas and figures, and the speeds derived from them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from neox.config import config_from_dict
from neox.model.flops import TokenFlops, flops_per_token
from neox.model.layers import Decoder
from neox.parallel.mesh import Mesh
from neox.training.callbacks import Metrics, mean_flops
from neox.training.metrics.loggers import MetricLog
from neox.training.metrics.throughput import Throughput, device_peak_tflops

DATA = Path(__file__).resolve().parents[1] / "data"


def shapes(*, layers, hidden, sequence, vocabulary, feed_forward=None, heads=1, **keys):
    flat = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": feed_forward,
        "seq_length": sequence,
        "padded_vocab_size": vocabulary,
        "train_micro_batch_size_per_gpu": 1,
    }
    return config_from_dict(flat | keys).model


SMALL = shapes(layers=12, hidden=768, sequence=2048, vocabulary=50304)
GPT3 = shapes(layers=96, hidden=12288, sequence=2048, vocabulary=50257)
NEOX_20B = shapes(layers=44, hidden=6144, sequence=2048, vocabulary=50432)
MEGATRON_GPT = shapes(layers=96, hidden=12288, sequence=2048, vocabulary=51200)
MODELS = [SMALL, GPT3, NEOX_20B, MEGATRON_GPT]


def matmul_parameters(c):
    return c.num_layers * 12 * c.hidden_size**2 + c.hidden_size * c.padded_vocab_size


@pytest.mark.parametrize("model", MODELS)
def test_palm_appendix_b(model):
    # Chowdhery et al. 2022, appendix B: 6 N + 12 L H Q T per token, H heads of size Q (H Q = D), T tokens.
    palm = 6 * matmul_parameters(model) + 12 * model.num_layers * model.hidden_size * model.seq_length
    assert flops_per_token(model, causal=False).model == pytest.approx(palm, rel=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_megatron_equation_3(model):
    # Narayanan et al. 2021, eq. 3: 96 B s l h^2 (1 + s / 6h + V / 16lh), with recomputation of the blocks.
    layers, hidden = model.num_layers, model.hidden_size
    sequence, vocabulary = model.seq_length, model.padded_vocab_size
    terms = 1 + sequence / (6 * hidden) + vocabulary / (16 * layers * hidden)
    flops = flops_per_token(model, causal=False)
    assert flops.hardware(checkpoint_activations=True) == pytest.approx(96 * layers * hidden**2 * terms, rel=1e-12)
    # Without: one forward of the blocks less, so that the head weighs V / 12lh.
    terms = 1 + sequence / (6 * hidden) + vocabulary / (12 * layers * hidden)
    assert flops.hardware(checkpoint_activations=False) == pytest.approx(72 * layers * hidden**2 * terms, rel=1e-12)
    assert flops.hardware(checkpoint_activations=False) == flops.model


def test_megatron_training_time():
    # Narayanan et al. 2021, section 5.1: 175B, 300B tokens, 1024 A100s at 140 TFLOP/s with recomputation take
    # 34 days; their estimate leaves out attention and the head, 3% here.
    flops = flops_per_token(MEGATRON_GPT, causal=False).hardware(checkpoint_activations=True)
    days = flops * 300e9 / (1024 * 140e12) / 86400
    assert days == pytest.approx(34, rel=0.04)


def test_gpt3():
    # Brown et al. 2020, table D.1: 3.14e23 FLOPs for 175B and 300B tokens, as 6 per parameter and token, so
    # attention is left out. Causal attention adds (S + 1) / 2 / 6D = 1.39%.
    total = flops_per_token(GPT3, causal=True).model * 300e9
    attention = 12 * GPT3.num_layers * GPT3.hidden_size * (GPT3.seq_length + 1) / 2 * 300e9
    assert total - attention == pytest.approx(3.14e23, rel=2e-3)
    assert total == pytest.approx(3.14e23 * 1.0139, rel=2e-3)


def test_gpt_neox_20b():
    # 20,554,567,680 parameters; the embedding (1.5%) is looked up and biases and norms take part in no
    # product.
    flops = flops_per_token(NEOX_20B, causal=False)
    products = 20_554_567_680 - 50432 * 6144 - 44 * (13 * 6144) - 2 * 6144
    assert matmul_parameters(NEOX_20B) == products
    assert flops.model == 6 * products + 12 * 44 * 6144 * 2048


def test_upstreams_formula():
    # Upstream counts 24 f B S L h^2 (1 + S / 6h + V / 16Lh), f = 4 with recomputation and 3 without, over
    # 1.5 s for a batch of 2: exact with recomputation, three quarters of the head without.
    golden = json.loads((DATA / "upstream_flops.json").read_text())
    for name, upstream in golden.items():
        keys = json.loads(name)
        model = shapes(
            layers=keys["num_layers"],
            hidden=keys["hidden_size"],
            sequence=keys["seq_length"],
            vocabulary=keys["padded_vocab_size"],
        )
        tokens_per_second = 2 * model.seq_length / 1.5
        flops = flops_per_token(model, causal=False)
        three_quarters_of_head = (flops.model - 0.25 * (3 * flops.head)) * tokens_per_second
        assert upstream["model"] == pytest.approx(three_quarters_of_head, rel=1e-12)
        if keys.get("checkpoint_activations"):
            executed = flops.hardware(checkpoint_activations=True) * tokens_per_second
            assert upstream["actual"] == pytest.approx(executed, rel=1e-12)


def test_counted_product_by_product():
    # The smallest case by hand: S = 2 tokens, D = 4, F = 8, V = 16, one layer.
    def product(m, n, k):
        return 2 * m * n * k

    blocks = product(2, 12, 4) + product(2, 4, 4) + product(2, 8, 4) + product(2, 4, 8)
    model = shapes(layers=1, hidden=4, sequence=2, vocabulary=16, feed_forward=8)
    full = flops_per_token(model, causal=False)
    assert full.blocks * 2 == blocks + product(2, 2, 4) + product(2, 4, 2)
    assert full.head * 2 == product(2, 16, 4)
    causal = flops_per_token(model, causal=True)
    # Query 1 sees one key, query 2 two: three of the four scores.
    assert causal.blocks * 2 == blocks + (product(2, 2, 4) + product(2, 4, 2)) * 3 / 4
    assert (causal.backward, causal.model) == (2 * causal.forward, 3 * causal.forward)


FAMILIES = {
    "gpt": {},
    "gpt_j": {"gpt_j_residual": True, "gpt_j_tied": True, "pos_emb": "rotary", "rotary_pct": 0.5},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "feed_forward": 192, "use_bias_in_mlp": False},
    "gqa": {"num_kv_heads": 2, "activation": "geglu", "pos_emb": "rotary"},
    "mqa": {"num_kv_heads": 1, "activation": "glu", "mlp_multiple_of": 32, "use_bias_in_attn_linear": False},
    "bloom": {"embedding_norm": True, "pos_emb": "alibi"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_counts_the_same_products(family):
    config = shapes(layers=2, hidden=64, sequence=32, vocabulary=128, heads=4, **FAMILIES[family])
    model, tokens = Decoder(config), torch.randint(0, 128, (2, 32))
    # The math backend computes the whole score matrix.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(tokens)
        forward = counter.get_total_flops()
        logits.sum().backward()
    flops = flops_per_token(config, causal=False)
    assert forward == flops.forward * 2 * 32
    assert counter.get_total_flops() == flops.model * 2 * 32


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_matrices_get_no_gradient(family):
    keys = FAMILIES[family] | {"no_weight_tying": True}
    config = shapes(layers=2, hidden=64, sequence=32, vocabulary=128, heads=4, **keys)
    model, tokens = Decoder(config).requires_grad_(False), torch.randint(0, 128, (2, 32))
    model.embedding.word_embeddings.weight.requires_grad_(True)  # so that gradients pass through every block
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    assert counter.get_total_flops() == flops_per_token(config, causal=False, frozen=True).model * 2 * 32
    assert mean_flops(config, {32: 2}, frozen=True) == flops_per_token(config, causal=False, frozen=True)


PREFERENCES = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 16, "padded_vocab_size": 128}
PREFERENCES |= {"train_micro_batch_size_per_gpu": 1, "dataset_impl": "pairwise", "pack_impl": "unpacked"}
PREFERENCES |= {f"{side}_train_{kind}data_paths": ["x"] for side in ("pos", "neg") for kind in ("", "label_")}


@pytest.mark.parametrize(("objective", "rows"), [("rm", 1), ("dpo", 128)])
def test_the_speed_of_pairs(objective, rows):
    config = config_from_dict(PREFERENCES | {"train_impl": objective}, world_size=None)
    metrics = Metrics(SimpleNamespace(config=config, mesh=Mesh()), MetricLog())
    metrics.samples[16] += 3
    speed = metrics._speed()
    assert (speed.samples, speed.tokens) == (3, 2 * 3 * 16)
    assert speed.flops.head == 2 * 8 * rows


def test_a_window_counts_the_keys_in_it():
    for length, window in ((7, 3), (7, 1), (7, 7), (7, 9)):
        seen = [min(query, window) + 1 for query in range(length)]
        config = shapes(layers=1, hidden=4, sequence=length, vocabulary=16, sliding_window_width=window)
        whole = shapes(layers=1, hidden=4, sequence=length, vocabulary=16)
        products = flops_per_token(whole, causal=False).blocks - 4 * 4 * length
        causal = flops_per_token(config, causal=True).blocks
        assert causal == pytest.approx(products + 4 * 4 * sum(seen) / length, rel=1e-12)
        assert flops_per_token(config, causal=False).blocks == products + 4 * 4 * max(seen)


def throughput(**changes):
    settings = {
        "samples": 64,
        "tokens": 64 * 1000,
        "steps": 4,
        "seconds": 2.0,
        "devices": 8,
        "flops": TokenFlops(blocks=8e9, head=2e9),
        "checkpoint_activations": True,
        "peak_tflops": 312.0,
    }
    return Throughput(**settings | changes)


def test_metrics():
    # 32,000 tokens/s x (30 + 8) GFLOP / 8 devices = 152 TFLOP/s as executed, 120 of them the model's.
    assert throughput().metrics() == {
        "runtime/samples_per_sec": 32.0,
        "runtime/iteration_time": 0.5,
        "runtime/steps_per_sec": 2.0,
        "runtime/tokens_per_sec": 32000.0,
        "runtime/flops_per_sec_per_gpu": pytest.approx(152e12),
        "runtime/model_flops_utilization": pytest.approx(120 / 312),
        "runtime/hardware_flops_utilization": pytest.approx(152 / 312),
    }


def test_without_peak_there_is_no_utilization():
    speed = throughput(peak_tflops=None, checkpoint_activations=False)
    assert (speed.mfu, speed.hfu) == (None, None)
    assert not any("utilization" in name for name in speed.metrics())
    assert speed.model_tflops == speed.hardware_tflops == pytest.approx(120)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("Tesla V100-PCIE-16GB", 112.0),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("Tesla T4", 65.0),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
    ],
)
def test_known_devices(name, peak):
    assert device_peak_tflops(name, precision="bfloat16") == peak
    assert device_peak_tflops(name, precision="fp32") is None
