"""Weights written in GPT-NeoX's layouts: against what GPT-NeoX itself wrote, and back."""

import random

import numpy as np
import pytest
import torch
import yaml
from checkpoint.exports import CountedWeights
from golden_models import GOLDENS, canonical, read_golden
from model_families import GQA, KEYS, LLAMA
from ranks import run_ranks
from weight_sources import RandomWeights

from neox.checkpoint.conversion.convert import write_native
from neox.checkpoint.described import open_described, progress_of
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.storage.torch_file import load_torch_file
from neox.checkpoint.upstream.reader import Hints
from neox.checkpoint.upstream.write import UpstreamLayout, UpstreamWriter
from neox.config import config_from_dict
from neox.data.tokenizers import build_tokenizer
from neox.errors import CheckpointError, UserError
from neox.model.layers import layer_list

SHAPE = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 40,
    "padded_vocab_size": 1024,
    "train_micro_batch_size_per_gpu": 1,
    "tokenizer_type": "CharLevelTokenizer",
}
MODELS = {
    "neox": KEYS["neox"],
    "sequential residual, tied": {"pos_emb": "rotary"},
    "llama, all heads": LLAMA,
    "llama, grouped heads": GQA,
    "falcon": KEYS["falcon"],
    "learned positions": KEYS["opt"],
    "alibi": {"pos_emb": "alibi", "gpt_j_residual": True, "use_qk_layernorm": True},
    "scalenorm": {"pos_emb": "none", "norm": "scalenorm", "use_qk_layernorm": True},
}
LAYOUTS = (UpstreamLayout(0, 2), UpstreamLayout(2, 1), UpstreamLayout(1, 4), UpstreamLayout())
ROW_BIASES = ("attention.dense.bias", "mlp.linear2.bias")


def written(tmp_path, layout, *, weights=None, iteration=7, **keys):
    """The folder that a writer makes of random weights, the writer, the weights."""
    config = config_from_dict(SHAPE | keys)
    weights = weights or RandomWeights(config.model)
    writer = UpstreamWriter(weights, config, layout=layout, iteration=iteration)
    return writer.write(tmp_path), writer, weights


def same_weights(reader, weights):
    assert set(reader.names()) == set(weights.names())
    for name in weights.names():
        assert reader.tensor(name).dtype == weights.tensor(name).dtype
        assert torch.equal(reader.tensor(name), weights.tensor(name)), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_what_is_written_is_read_back(tmp_path, model, layout):
    keys = MODELS[model]
    if layout.tensor == 4 and "num_kv_heads" in keys:
        layout = UpstreamLayout(1, 2)
    folder, _, weights = written(tmp_path, layout, **keys)
    reader = open_checkpoint(tmp_path)
    assert reader.folder == folder == tmp_path / "global_step7"
    assert reader.iteration == 7
    same_weights(reader, weights)


def tensors_of(folder):
    """Every tensor of the weights, by file and name."""
    found = {}
    for path in sorted(folder.glob("*.pt")):
        content = torch.load(path, weights_only=False)
        by_name = content if path.name.startswith("layer_") else content["module"] or {}
        found |= {(path.name, name): tensor for name, tensor in by_name.items()}
    return found


RUNS = {
    "seq": UpstreamLayout(0, 1),
    "pipe": UpstreamLayout(1, 1),
    "seq_tp2": UpstreamLayout(0, 2),
    "pipe_tp2": UpstreamLayout(1, 2),
    "pipe_pp2_tied": UpstreamLayout(2, 1),
    "a_neox_pp0": UpstreamLayout(0, 1),
    "e_llama_gqa": UpstreamLayout(1, 1),
}


@pytest.mark.parametrize("name", RUNS)
def test_upstream_to_native_to_upstream_is_the_identity(tmp_path, name):
    root = GOLDENS / name / "ckpt" if name.startswith(("a_", "e_")) else GOLDENS / name
    weights, config = open_described(root)
    write_native(weights, config, tmp_path / "native")
    native, config = open_described(tmp_path / "native")
    step, layout = weights.folder, RUNS[name]
    progress = progress_of(weights)
    back = UpstreamWriter(native, config, layout=layout, iteration=progress.iteration).write(tmp_path / "back")
    assert back.name == step.name
    theirs, ours = tensors_of(step), tensors_of(back)
    assert ours.keys() == theirs.keys()
    for key, tensor_there in theirs.items():
        # Each rank of GPT-NeoX has its own copy of these; their sum or mean is what is kept.
        if not (layout.tensor > 1 and key[1].endswith(ROW_BIASES)):
            assert torch.equal(ours[key], tensor_there), key
    same_weights(open_checkpoint(tmp_path / "back"), weights)
    assert {path.name for path in step.glob("*.pt")} <= {path.name for path in back.glob("*.pt")}


@pytest.mark.parametrize(
    "name", ["pythia_like", "gpt2_default", "rotary_seqres_untied", "alibi", "llama_gqa", "llama_mha"]
)
def test_each_rank_gets_what_upstream_gave_it(tmp_path, name):
    """Weights of two ranks from GPT-NeoX itself, joined and divided again."""
    parts = [read_golden(GOLDENS / "tp2" / f"{name}.rank{rank}.npz") for rank in (0, 1)]
    config, by_rank = parts[0][0], [weights for _, _, weights in parts]
    (tmp_path / "given").mkdir()
    for rank, weights in enumerate(by_rank):
        torch.save({"module": weights}, tmp_path / "given" / f"mp_rank_{rank:02d}_model_states.pt")
    joined = open_checkpoint(tmp_path / "given", hints=Hints(gpt_j_residual=config.model.gpt_j_residual))
    folder = UpstreamWriter(joined, config, layout=UpstreamLayout(0, 2)).write(tmp_path / "out")
    for rank, weights in enumerate(by_rank):
        module = torch.load(folder / f"mp_rank_{rank:02d}_model_states.pt", weights_only=True)["module"]
        assert module.keys() == {key for key in weights if not key.endswith(("inv_freq", "slopes"))}
        for key, tensor in module.items():
            if not key.endswith(ROW_BIASES):
                assert torch.equal(tensor, weights[key]), key
    for key in by_rank[0]:
        if key.endswith(ROW_BIASES):
            copies = [torch.load(path, weights_only=True)["module"][key] for path in sorted(folder.glob("*.pt"))]
            whole = joined.tensor(canonical(key))
            assert torch.equal(sum(copies) if config.model.gpt_j_residual else copies[0], whole), key
            assert torch.equal(copies[0], copies[1])


def test_state_beside_the_weights(tmp_path):
    """Every key that GPT-NeoX and DeepSpeed look up, of the kind that they expect."""
    folder, _, _ = written(tmp_path, UpstreamLayout(2, 2), **KEYS["neox"])
    assert sorted(path.name for path in folder.glob("mp_rank*")) == [
        f"mp_rank_{rank:02d}_model_states.pt" for rank in range(4)
    ]
    states = [torch.load(path, weights_only=True) for path in sorted(folder.glob("mp_rank*"))]
    golden = load_torch_file(GOLDENS / "pipe_tp2" / "global_step3" / "mp_rank_00_model_states.pt")
    assert golden.keys() - states[0].keys() <= {"checkpoint_parallel_dimensions"}
    assert states[0]["args"].keys() == golden["args"].keys()
    assert states[0]["args"] == {
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        "make_vocab_size_divisible_by": 512,
        "padded_vocab_size": 1024,
        "tokenizer_type": "CharLevelTokenizer",
        "model_parallel_size": 2,
    }
    assert [states[0][key] for key in ("module", "iteration", "mp_world_size", "dp_world_size")] == [None, 7, 4, 1]
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        for state in states:
            random.setstate(state["random_rng_state"])
            np.random.set_state(state["np_rng_state"])
            torch.set_rng_state(state["torch_rng_state"])
        drawn = random.random(), np.random.random(), torch.rand(()).item()
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
    torch_drawn = torch.rand((), generator=torch.Generator().manual_seed(1234)).item()
    assert drawn == (random.Random(1234).random(), np.random.RandomState(1234).random_sample(), torch_drawn)
    trackers = [bytes(state["rng_tracker_states"]["model-parallel-rng"].tolist()) for state in states]
    # Stages outermost: ranks 0 and 2 are tensor rank 0.
    assert [int.from_bytes(tracker[:8], "little") for tracker in trackers] == [1234 + 2718 + i for i in (0, 1, 0, 1)]


def test_vocabulary_is_what_gpt_neox_computes(tmp_path):
    """It rounds the tokenizer's size up to a multiple of make_vocab_size_divisible_by times the tensor ranks."""
    tokens = build_tokenizer(config_from_dict(SHAPE).tokenizer).vocab_size
    assert tokens == 512
    cases = [
        # rows, key, tensor ranks -> rows, key: the key is kept where it gives the rows
        (512, 128, 2, 512, 128),
        (512, 128, 4, 512, 128),
        (640, 128, 1, 640, 640),
        (640, 128, 2, 768, 384),
        (516, 129, 4, 516, 129),
        (515, 128, 2, 516, 258),
    ]
    for number, (rows, key, ranks, padded, becomes) in enumerate(cases):
        keys = KEYS["neox"] | {"padded_vocab_size": rows, "make_vocab_size_divisible_by": key}
        folder, _, weights = written(tmp_path / str(number), UpstreamLayout(0, ranks), **keys)
        arguments = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)["args"]
        assert (arguments["padded_vocab_size"], arguments["make_vocab_size_divisible_by"]) == (padded, becomes)
        described = yaml.safe_load((folder / "configs" / "model.yml").read_text())
        assert (described["model_parallel_size"], described["make_vocab_size_divisible_by"]) == (ranks, becomes)
        assert -(-tokens // (becomes * ranks)) * becomes * ranks == padded
        for name in ("layers.0.word_embeddings.weight", "layers.7.final_linear.weight"):
            tensor = open_checkpoint(folder).tensor(name)
            assert torch.equal(tensor[:rows], weights.tensor(name))
            assert tensor.shape[0] == padded
            assert not tensor[rows:].any()


def test_the_description_holds_keys_of_gpt_neox_only(tmp_path):
    keys = (GOLDENS.parent / "upstream_keys.tsv").read_text().splitlines()
    known = {line.split("\t")[0] for line in keys}
    given = GQA | {"precision": "bfloat16", "compile": False, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    folder, _, _ = written(tmp_path, UpstreamLayout(0, 2), **given)
    described = yaml.safe_load((folder / "configs" / "model.yml").read_text())
    assert described.keys() <= known - {"optimizer"}
    assert {key: described[key] for key in GQA} == GQA
    assert {tensor.dtype for tensor in tensors_of(folder).values()} == {torch.bfloat16}


@pytest.mark.parametrize("layout", [UpstreamLayout(0, 2, legacy=True), UpstreamLayout(1, 1, legacy=True)])
def test_legacy_names(tmp_path, layout):
    folder, _, weights = written(tmp_path / "neox", layout, **KEYS["neox"])
    names = {name.removeprefix("sequential.2.") for _, name in tensors_of(folder)}
    assert {"mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.bias"} <= names
    assert not any("linear1" in name or "linear2" in name for name in names)
    same_weights(open_checkpoint(folder), weights)
    # Llama's of those days: gate, down, up, each a matrix of its own.
    folder, _, weights = written(tmp_path / "llama", layout, **LLAMA)
    tensors = [tensor for (file, name), tensor in tensors_of(folder).items() if name.endswith("mlp.w1.weight")]
    gates = torch.cat(tensors[:: len(tensors) // 3][:1]) if layout.tensor == 1 else None
    whole = weights.tensor("layers.2.mlp.linear1.weight")
    assert gates is None or torch.equal(gates, whole[whole.shape[0] // 2 :])
    assert {name.rpartition("mlp.")[2] for _, name in tensors_of(folder) if "mlp" in name} == {
        "w1.weight",
        "w2.weight",
        "w3.weight",
    }


@pytest.mark.parametrize(
    ("layout", "keys", "message"),
    [
        (UpstreamLayout(0, 8), KEYS["neox"], "num_attention_heads: 4 is not divisible by model_parallel_size 8"),
        (UpstreamLayout(0, 4), GQA, "num_kv_heads: 2 is not divisible by model_parallel_size 4"),
        (UpstreamLayout(), KEYS["bloom"], "embedding_norm: True; GPT-NeoX has no such model"),
        (UpstreamLayout(), KEYS["llama"], "rope_scaling: .*; GPT-NeoX has no such model"),
        (UpstreamLayout(), KEYS["mixtral"], "moe_num_experts: 5; GPT-NeoX keeps the experts of a rank in one matrix"),
        (UpstreamLayout(legacy=True), GQA, "num_kv_heads: 2; GPT-NeoX ordered shared heads otherwise"),
    ],
)
def test_what_gpt_neox_lacks_is_refused(tmp_path, layout, keys, message):
    with pytest.raises(UserError, match=message) as raised:
        written(tmp_path, layout, **keys)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_written_once_and_whole(tmp_path, monkeypatch):
    folder, _, weights = written(tmp_path, UpstreamLayout(), **KEYS["neox"])
    assert (tmp_path / "latest").read_text() == "global_step7"
    with pytest.raises(CheckpointError, match=r"holds checkpoints already \(global_step7\)"):
        written(tmp_path, UpstreamLayout(), **KEYS["neox"])
    read = RandomWeights.tensor
    monkeypatch.setattr(RandomWeights, "tensor", lambda self, name: failing(self, name, read))
    with pytest.raises(CheckpointError, match="cannot be written"):
        written(tmp_path / "other", UpstreamLayout(), iteration=8, **KEYS["neox"])
    monkeypatch.undo()
    assert list((tmp_path / "other").iterdir()) == []
    assert (tmp_path / "latest").read_text() == "global_step7"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step7", "latest", "other"]
    same_weights(open_checkpoint(folder), weights)


def failing(weights, name, read):
    if name.startswith("layers.3"):
        raise OSError(28, "No space left on device", "disk")
    return read(weights, name)


def test_files_hold_what_was_announced(tmp_path):
    """The bytes that a dry run tells, per file; and each tensor of the source is read once."""
    config = config_from_dict(SHAPE | GQA)
    for number, layout in enumerate(LAYOUTS[:2]):
        weights = CountedWeights(config.model)
        writer = UpstreamWriter(weights, config, layout=layout)
        announced = writer.files()
        folder = writer.write(tmp_path / str(number))
        assert set(announced) == {path.name for path in folder.glob("*.pt")}
        found = dict.fromkeys(announced, 0)
        for (file, _), tensor in tensors_of(folder).items():
            found[file] += tensor.nbytes
        assert found == announced
        assert weights.reads == dict.fromkeys(weights.names(), 1)


def load_with_deepspeed(root):
    """Load both layouts by DeepSpeed's own code, as GPT-NeoX does; runs on a rank."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes minutes
    deepspeed.init_distributed("gloo")
    _, config = open_described(root / "sequential")
    specs = {spec.disk_index: spec for spec in layer_list(config.model)}
    sequential = torch.nn.Module()
    sequential.sequential = torch.nn.ModuleDict({str(index): spec.build() for index, spec in specs.items()})
    stages = [specs[index].build() if index in specs else unchanged for index in range(max(specs) + 1)]
    found = {}
    for name, model in (("sequential", sequential), ("pipeline", PipelineModule(stages, num_stages=1))):
        engine, *_ = deepspeed.initialize(
            model=model,
            config={"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1},
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )
        path, state = engine.load_checkpoint(str(root / name), load_module_only=True)
        assert path is not None
        parameters = {key.removeprefix("sequential."): value for key, value in model.named_parameters()}
        found[name] = {f"layers.{key}": value.detach().clone() for key, value in parameters.items()}, state["iteration"]
    return found


def unchanged(hidden):
    """What GPT-NeoX has at the numbers that no file has."""
    return hidden


def test_deepspeed_loads_what_is_written(tmp_path):
    _, _, weights = written(tmp_path / "sequential", UpstreamLayout(), **KEYS["neox"])
    written(tmp_path / "pipeline", UpstreamLayout(1, 1), **KEYS["neox"])
    (found,) = run_ranks(load_with_deepspeed, 1, tmp_path)
    for parameters, iteration in found.values():
        assert iteration == 7
        assert parameters.keys() == set(weights.names())
        assert all(torch.equal(parameters[name], weights.tensor(name)) for name in parameters)
