"""Training speed on one GPU: ours beside transformers and plain matrix products; and GPT-NeoX-20B's inference.

    python benchmarks/gpu.py                                the Pythia 160M, 410M, 1.4B and 6.9B shapes
    python benchmarks/gpu.py --models 410M --json gpu.json
    python benchmarks/gpu.py --generate-20b                 a forward pass and generation; needs 45 GB

Sequences of 2048 tokens in bf16; each contestant at the micro batch that is fastest for it. See docs/benchmarks.md
for what is compared with what.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox.errors import LaunchError
from neox.launch.main import script_main

SEQUENCE = 2048
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
WORTHWHILE = 1.02
"""A doubled micro batch that is not this much faster ends the search."""


def main(arguments: list[str]) -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["160M", "410M", "1.4B", "6.9B"], metavar="NAME", help="default: all four"
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed steps at each micro batch (default: 10)")
    parser.add_argument("--generate-20b", action="store_true", help="time inference of the 20B shape instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file too")
    options = parser.parse_args(arguments)

    import torch

    from benchmarks.contestants import single_process
    from benchmarks.measure import machine
    from benchmarks.shapes import NEOX_20B, shapes_named

    shapes = shapes_named(options.models)
    if not torch.cuda.is_available():
        raise LaunchError("benchmarks/gpu.py: torch sees no CUDA device here; `make bench` measures on the CPU")
    results: dict[str, Any] = {"machine": machine(), "models": {}}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()), flush=True)
    if options.generate_20b:
        results["models"]["20B"] = measure_inference(NEOX_20B, sequence=SEQUENCE)
        print("\n".join(f"{name}: {value:,.1f}" for name, value in results["models"]["20B"].items()))
    else:
        with single_process(shapes[0].config(sequence=SEQUENCE)) as mesh:
            for shape in shapes:
                result = measure_training(shape, mesh, sequence=SEQUENCE, rounds=options.rounds, compiled=True)
                results["models"][shape.name] = result
                print("\n" + report(shape.name, result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure_training(
    shape: Any,
    mesh: Any,
    *,
    sequence: int,
    rounds: int,
    compiled: bool,
    micro_batches: Iterable[int] = MICRO_BATCHES,
    gemm_size: int = 8192,
) -> dict[str, Any]:
    """Time one shape, each contestant alone on the device, since two large models do not fit beside each other.

    Args:
        shape: a `benchmarks.shapes.Shape`.
        mesh: from `benchmarks.contestants.single_process`.
        sequence: tokens of a sequence.
        rounds: timed steps at each micro batch.
        compiled: whether the peer is compiled; ours follows the product's default for the device.
        micro_batches: sequences of a step to try, growing.
        gemm_size: the limit is the bf16 product of square matrices of this size.

    Returns:
        `rows` of the table by contestant (None: out of memory at the smallest micro batch) and `gemm`, TFLOP/s.
    """
    import torch

    from benchmarks.contestants import Engine, Transformers

    config = shape.config(sequence=sequence, precision="bfloat16", zero_stage=1)
    if compiled:
        # Each micro batch is compiled for its own shape, as a run with one micro batch would be.
        torch._dynamo.config.automatic_dynamic_shapes = False
    limit = _gemm_rate(gemm_size, mesh.device)
    builders = {
        Engine.name: lambda: Engine(config, mesh),
        Transformers.name: lambda: Transformers(config, mesh.device, autocast=True, compiled=compiled),
    }
    rows = {
        name: _fastest(build, config, mesh.device, rounds=rounds, micro_batches=micro_batches, limit=limit)
        for name, build in builders.items()
    }
    peer = rows[Transformers.name]
    for row in rows.values():
        if row is not None:
            row["x peer"] = row["tokens/s"] / peer["tokens/s"] if peer else None
    return {"rows": rows, "gemm": limit / 1e12}


def _gemm_rate(size: int, device: Any) -> float:
    """Best FLOP/s of a square bf16 product."""
    import torch

    from benchmarks.measure import Product, time_interleaved

    product = Product(size, size, size)
    runs = {"gemm": product.runner(device, torch.bfloat16)}
    return product.flops / time_interleaved(runs, device=device, rounds=20, warmup=5)["gemm"].best


def _fastest(
    build: Callable[[], Any], config: Any, device: Any, *, rounds: int, micro_batches: Iterable[int], limit: float
) -> dict[str, Any] | None:
    """The row of a contestant at its fastest micro batch; None if not even the smallest fits."""
    import torch

    from benchmarks.measure import free_memory

    best: dict[str, Any] | None = None
    contestant = None
    free_memory(device)
    try:
        contestant = build()
        for micro_batch in micro_batches:
            free_memory(device)
            row = _timed_row(contestant, config, device, micro_batch=micro_batch, rounds=rounds, limit=limit)
            if best is not None and row["tokens/s"] < WORTHWHILE * best["tokens/s"]:
                break
            best = row
    except torch.OutOfMemoryError:
        pass  # What fitted stands.
    if contestant is not None:
        for parameter in contestant.model.parameters():  # DeepSpeed keeps hold of them when its engine is gone.
            parameter.data = parameter.new_empty(0)
        del contestant
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    free_memory(device)
    return best


def _timed_row(
    contestant: Any, config: Any, device: Any, *, micro_batch: int, rounds: int, limit: float
) -> dict[str, Any]:
    """Speed and memory at one micro batch."""
    import torch

    from benchmarks.measure import Speed, time_interleaved
    from neox.model.flops import flops_per_token
    from neox.training.metrics.throughput import device_peak_tflops

    sequence, on_gpu = config.model.seq_length, device.type == "cuda"
    tokens = torch.randint(config.model.padded_vocab_size, (micro_batch, sequence + 1), device=device)
    timing = time_interleaved({"step": lambda: contestant.step(tokens)}, device=device, rounds=rounds, warmup=3)
    causal, full = (flops_per_token(config.model, causal=kind) for kind in (True, False))
    speed = Speed(micro_batch * sequence, timing["step"], causal=causal, full=full, limit=limit)
    peak = device_peak_tflops(torch.cuda.get_device_name(device), precision="bfloat16") if on_gpu else None
    return {
        "micro batch": micro_batch,
        "tokens/s": speed.tokens_per_second,
        "TFLOP/s, causal": causal.model * speed.tokens_per_second / 1e12,
        "TFLOP/s, full": full.model * speed.tokens_per_second / 1e12,
        "MFU %, causal": 100 * causal.model * speed.tokens_per_second / (peak * 1e12) if peak else None,
        "MFU %, full": 100 * full.model * speed.tokens_per_second / (peak * 1e12) if peak else None,
        "% of GEMM, full": 100 * full.model * speed.tokens_per_second / limit,
        "peak GiB": torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
    }


def report(name: str, result: dict[str, Any]) -> str:
    """The table of one shape and the lines around it."""
    from benchmarks.measure import table

    rows = [{"": contestant, **row} for contestant, row in result["rows"].items() if row is not None]
    missing = [f"{contestant}: out of memory" for contestant, row in result["rows"].items() if row is None]
    head = f"{name}, bf16, sequences of {SEQUENCE}; GEMM {result['gemm']:.0f} TFLOP/s"
    return "\n".join([head, *([table(rows)] if rows else []), *missing])


def measure_inference(
    shape: Any, *, sequence: int, prompt: int = 128, new_tokens: int = 64, copied: int = 2**32
) -> dict[str, float]:
    """Time a forward pass over a whole sequence and greedy generation for one prompt, with random bf16 weights.

    Args:
        shape: a `benchmarks.shapes.Shape`.
        sequence: tokens of the forward pass.
        prompt: tokens of the prompt.
        new_tokens: tokens to generate.
        copied: bytes of the copy that measures the memory's bandwidth.
    """
    import torch

    from benchmarks.measure import free_memory, time_interleaved
    from neox.inference.generate import GenerationSettings, generate
    from neox.model.build import build_decoder
    from neox.parallel.mesh import Mesh

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = shape.config(sequence=sequence, precision="bfloat16", zero_stage=1)
    free_memory(device)
    source = _random_weights(device)
    model = build_decoder(config.model, source=source, mesh=Mesh(device=device), dtype=torch.bfloat16).eval()
    tokens = torch.randint(shape.vocabulary, (1, sequence), device=device)
    memory = torch.empty(copied, dtype=torch.uint8, device=device)
    settings = GenerationSettings(maximum_tokens=new_tokens)
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: model(tokens),
        # No token is called -1: random weights must not end the text.
        "generate": lambda: generate(model, [tokens[0, :prompt].tolist()], settings=settings),
        "copy": memory.clone,
    }
    with torch.inference_mode():
        timings = time_interleaved(runs, device=device, rounds=3, warmup=1)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    tokens_per_second = new_tokens / timings["generate"].median
    return {
        "parameters, billion": sum(p.numel() for p in model.parameters()) / 1e9,
        "forward, tokens/s": sequence / timings["forward"].median,
        "generation, tokens/s (prompt included)": tokens_per_second,
        "weights read in generation, GB/s": weight_bytes * tokens_per_second / 1e9,
        "memory copy, GB/s read and written": 2 * copied / timings["copy"].best / 1e9,
        "peak GiB": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0,
    }


def _random_weights(device: Any) -> Callable[[str, Any], Any]:
    """Weights drawn on the device: minutes less than the product's, which are drawn on the CPU to be reproducible."""
    import torch

    generator = torch.Generator(device=device).manual_seed(0)

    def draw(name: str, shape: Any) -> torch.Tensor:
        if name.endswith(".bias"):
            return torch.zeros(shape, device=device, dtype=torch.bfloat16)
        if "norm" in name.split(".")[-2]:
            return torch.ones(shape, device=device, dtype=torch.bfloat16)
        return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)

    return draw


if __name__ == "__main__":
    sys.exit(script_main(main))
