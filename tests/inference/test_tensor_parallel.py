"""Two tensor-parallel ranks, or two copies of the model, generate what one process does."""

import os
from pathlib import Path

from inference.small_model import save_small, small_config, small_model
from ranks import run_ranks

from neox.inference.generate import GenerationSettings, generate
from neox.inference.loading import load_model
from neox.inference.modes import complete_shared
from neox.inference.sampling import Sampling
from neox.inference.session import join
from neox.inference.text import TextGenerator
from neox.launch.environment import detect

# 131 rows of vocabulary do not divide by 2.
ODD = {"padded_vocab_size": 131, "model_parallel_size": 2}
PROMPTS = [[65, 66, 67], [100, 101, 102, 103, 104, 105], [7]]
GREEDY = GenerationSettings(maximum_tokens=20)
DRAWN = GenerationSettings(maximum_tokens=20, sampling=Sampling(temperature=1.0, top_k=50))
TEXTS = ["one", "twenty-two", "three", "", "five hundred"]


def _tokens_of_rank() -> list[list[int]]:
    with join(small_config(**ODD), detect(os.environ)) as mesh:
        assert mesh.tensor_size == 2
        model = small_model(mesh, **ODD).double()
        completions = [c for s in (GREEDY, DRAWN) for c in generate(model, PROMPTS, settings=s)]
        return [completion.tokens for completion in completions]


def test_two_tensor_ranks_give_the_tokens_of_one() -> None:
    model = small_model(padded_vocab_size=131).double()
    expected = [c.tokens for s in (GREEDY, DRAWN) for c in generate(model, PROMPTS, settings=s)]
    assert run_ranks(_tokens_of_rank, 2) == [expected, expected]


def _texts_of_rank(folder: str, tensor_size: int) -> list[str]:
    config = small_config(model_parallel_size=tensor_size, load=folder)
    with join(config, detect(os.environ)) as mesh:
        model, tokenizer = load_model(config, mesh)
        generator = TextGenerator(model, tokenizer, batch_size=2)
        return [result.text for result in complete_shared(generator, TEXTS, DRAWN, mesh)]


def test_copies_of_a_model_share_the_prompts_and_all_get_all_texts(tmp_path: Path) -> None:
    folder = save_small(tmp_path)
    config = small_config(load=str(folder))
    with join(config, None) as mesh:
        generator = TextGenerator(*load_model(config, mesh))
        expected = [result.text for result in generator.complete(TEXTS, settings=DRAWN)]
    assert run_ranks(_texts_of_rank, 2, str(folder), 1) == [expected, expected]
    assert run_ranks(_texts_of_rank, 2, str(folder), 2) == [expected, expected]
