"""An exported model generates under transformers what it generates here."""

import pytest
import torch
from inference.small_model import save_small, small_config
from model_families import GQA, MIXTRAL
from transformers import AutoModelForCausalLM

from neox.checkpoint.conversion.convert import write_native
from neox.checkpoint.conversion.export import Export, export
from neox.checkpoint.described import open_described
from neox.checkpoint.huggingface import HuggingFaceReader
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.weights import weight_source
from neox.inference.generate import GenerationSettings, generate
from neox.model.build import build_decoder

MODELS = {
    "neox": {},
    "neox, tied, sequential residual, tanh": {
        "no_weight_tying": False,
        "gpt_j_residual": False,
        "bias_gelu_fusion": True,
    },
    "llama, grouped heads": GQA | {"gpt_j_residual": False, "rotary_pct": 1.0, "rotary_emb_base": 500.0},
    "mixtral": MIXTRAL | {"gpt_j_residual": False, "rotary_pct": 1.0},
}
PROMPTS = [[5, 77, 301, 4, 4, 19], [400], [9, 8, 7, 6, 5, 4, 3, 2, 1, 450, 33, 12]]
NEW_TOKENS = 30


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_same_under_transformers(tmp_path, name):
    save_small(tmp_path / "run", **MODELS[name])
    weights, config = open_described(tmp_path / "run")
    list(export(weights, config, tmp_path / "hf", Export(save_tokenizer=False, check=False)))
    ours = build_decoder(config.model, source=weight_source(weights)).eval()
    settings = GenerationSettings(maximum_tokens=NEW_TOKENS)
    free = generate(ours, PROMPTS, settings=settings)
    assert len({tuple(completion.tokens) for completion in free}) == len(PROMPTS)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    for prompt, completion in zip(PROMPTS, free, strict=True):
        assert continued(theirs, prompt, eos_token_id=None) == completion.tokens
    # Both end a document at the same token: one that the first prompt is known to give.
    end = free[0].tokens[10]
    stopped = generate(ours, PROMPTS[:1], settings=settings, ends=[end])[0]
    assert len(stopped.tokens) < NEW_TOKENS
    assert continued(theirs, PROMPTS[0], eos_token_id=end) == [*stopped.tokens, end]


def continued(model, prompt, **options):
    """New tokens of transformers, with the settings of generation_config.json but for `options`."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, pad_token_id=0, **options
        )
    return out[0, len(prompt) :].tolist()


def test_and_so_does_one_that_came_from_transformers(tmp_path):
    """The other way round: a folder of transformers' own making."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    reader = HuggingFaceReader(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    config = small_config(**reader.config_keys())
    write_native(reader, config, tmp_path / "run")
    ours = build_decoder(config.model, source=weight_source(open_checkpoint(tmp_path / "run"))).eval()
    prompts = [[token % 320 for token in prompt] for prompt in PROMPTS]
    completions = generate(ours, prompts, settings=GenerationSettings(maximum_tokens=NEW_TOKENS))
    for prompt, completion in zip(prompts, completions, strict=True):
        assert continued(theirs, prompt, eos_token_id=None) == completion.tokens
