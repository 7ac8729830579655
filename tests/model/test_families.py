"""Every family at every kind of layout: it trains alike, is saved and loaded, and generates alike with a cache.

All families run one after another in the same processes, which costs a third of processes for each.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_families import KEYS
from ranks import run_ranks
from training.layouts import SGD, TRAINING, VOCABULARY, Recorder, write_corpus
from weight_sources import RandomWeights

STEPS, SAVED = 4, 2
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "padded_vocab_size": VOCABULARY,
    # Wide enough that every part of the model matters from the first step.
    "init_method_std": 0.1,
}
OWN: dict[str, dict[str, Any]] = {
    # Two heads of keys instead of one, as tensor ranks must divide them.
    "palm": {"num_kv_heads": 2},
    # The load-balancing loss is of a micro-batch, so layouts must have the same ones; and no expert is chosen by luck.
    "mixtral": {"gradient_accumulation_steps": 2, "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.01},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"model_parallel_size": 2},
    "tp2_sp": {"model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2},
}
PROMPTS = [[65, 66, 67], list(range(40, 60)), [7], [100, 101, 102, 103, 104, 105]]


@dataclass
class Outcome:
    """What a rank saw of one family.

    Attributes:
        losses, norms: of each step of a run, which saves after `SAVED` and at its end.
        resumed: losses of the steps after `SAVED` by a run that loads one process's checkpoint of that step.
        weights: what this rank owns of the model at the end.
        cached, recomputed: greedy tokens of a random model and their logits, with a cache of keys and without.
    """

    losses: list[float]
    norms: list[float]
    resumed: list[float]
    weights: dict[str, np.ndarray]
    cached: tuple[list[list[int]], np.ndarray]
    recomputed: tuple[list[list[int]], np.ndarray]


def flat_of(family: str, folder: str, corpus: str) -> dict[str, Any]:
    """Keys of a run of a family at one process."""
    training = TRAINING | SGD | {"train_iters": STEPS, "data_path": corpus, "train_batch_size": 8, "warmup": 0.25}
    saving = {"save": folder, "extra_save_iters": [SAVED, STEPS]}
    return SIZES | KEYS[family] | OWN.get(family, {}) | training | saving


def run_families(layout: dict[str, Any], root: str, corpus: str, reference: str) -> dict[str, Outcome]:
    """Train, resume and generate with every family on this rank."""
    torch.set_num_threads(1)
    return {
        family: _run_family(flat_of(family, f"{root}/{family}", corpus) | layout, f"{reference}/{family}")
        for family in KEYS
    }


def _run_family(flat: dict[str, Any], reference: str) -> Outcome:
    from neox.config import config_from_dict
    from neox.training.state import owned_tensors

    world_size = int(os.environ["WORLD_SIZE"])
    config = config_from_dict(flat, world_size=world_size)
    engine, recorder = _train(config)
    resumed: list[Any] = []
    if not config.parallel.sequence_parallel:  # which loads as tensor parallelism does
        loading = {"load": reference, "iteration": SAVED, "save": None}
        resumed = _train(config_from_dict(flat | loading, world_size=world_size))[1].steps
    return Outcome(
        losses=[float(step.loss) for step in recorder.steps],
        norms=[float(step.gradient_norm) for step in recorder.steps],
        resumed=[float(step.loss) for step in resumed],
        weights={t.key: t.value.float().numpy() for t in owned_tensors(engine, with_optimizer=False)},
        cached=_generate(config, recompute=False),
        recomputed=_generate(config, recompute=True),
    )


def _train(config: Any) -> tuple[Any, Recorder]:
    """Run to the last iteration on a mesh of its own, saving as configured."""
    from neox.data import build_datasets
    from neox.training.callbacks import Checkpoints
    from neox.training.loop import Run, training_loop
    from neox.training.run import batch_maker, start_or_resume, train_loader

    mesh = _mesh(config)
    engine, progress, schedule = start_or_resume(config, mesh)
    loader = train_loader(config, mesh, build_datasets(config), progress.consumed_samples)
    recorder = Recorder(engine)
    callbacks: list[Any] = [recorder]
    if config.checkpoint.save:
        callbacks.append(Checkpoints(engine, schedule, last_iteration=STEPS))
    training_loop(Run(engine, loader, batch_maker(config, mesh), schedule, STEPS), progress, callbacks)
    return engine, recorder


def _mesh(config: Any) -> Any:
    """The groups of a run, those of the one before it forgotten."""
    from neox.parallel.mesh import build_mesh, import_megatron

    import_megatron().destroy_model_parallel()
    return build_mesh(config)


def _generate(config: Any, *, recompute: bool) -> tuple[list[list[int]], np.ndarray]:
    """Greedy tokens of a random model in float64, and all their logits rounded once to float32.

    Pipelines and sequence parallelism cannot generate.
    """
    from neox.inference.generate import GenerationSettings, generate
    from neox.model.build import build_decoder

    if config.parallel.pipeline_stages > 1 or config.parallel.sequence_parallel:
        return [], np.empty(0)
    weights = RandomWeights(config.model).weight
    model = build_decoder(config.model, source=weights, mesh=_mesh(config), dtype=torch.float64).eval()
    settings = GenerationSettings(maximum_tokens=12, recompute=recompute, return_logits=True)
    found = generate(model, PROMPTS, settings=settings)
    return [c.tokens for c in found], torch.cat([c.logits for c in found if c.logits is not None]).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return write_corpus(folder / "corpus_text_document", documents=20)


@pytest.fixture(scope="module")
def reference(folder: Path, corpus: str) -> dict[str, Outcome]:
    """One process."""
    root = str(folder / "one")
    return run_ranks(run_families, 1, {}, root, corpus, root)[0]


@pytest.mark.parametrize("family", KEYS)
def test_one_process_resumes_and_generates_alike(reference: dict[str, Outcome], family: str) -> None:
    found = reference[family]
    assert len(found.losses) == STEPS
    assert found.losses[-1] < found.losses[0]
    assert found.resumed == found.losses[SAVED:]
    same_text(found.cached, found.recomputed)
    assert [len(tokens) for tokens in found.cached[0]] == [12] * len(PROMPTS)


def same_text(found: tuple[list[list[int]], np.ndarray], expected: tuple[list[list[int]], np.ndarray]) -> None:
    """The same tokens, drawn from the same logits."""
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], rtol=2**-23, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_one_process(folder: Path, corpus: str, reference: dict[str, Outcome], layout: str) -> None:
    root = str(folder / layout)
    ranks = run_ranks(run_families, 2, LAYOUTS[layout], root, corpus, str(folder / "one"))
    for family, one in reference.items():
        first, second = (rank[family] for rank in ranks)
        np.testing.assert_allclose(first.losses, one.losses, rtol=0, atol=2e-5, err_msg=family)
        np.testing.assert_allclose(first.norms, one.norms, rtol=2e-5, atol=0, err_msg=family)
        expected = [] if layout == "tp2_sp" else one.losses[SAVED:]
        np.testing.assert_allclose(first.resumed, expected, rtol=0, atol=2e-5, err_msg=family)
        weights = first.weights | second.weights
        assert weights.keys() == one.weights.keys()
        for name, weight in one.weights.items():
            np.testing.assert_allclose(weights[name], weight, rtol=0, atol=1e-4, err_msg=f"{family} {name}")
        if layout == "tp2":
            for text in (first.cached, first.recomputed, second.cached):
                same_text(text, one.cached)
