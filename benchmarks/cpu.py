"""Training speed on a CPU: ours, with and without its engine, beside transformers and plain matrix products.

    python benchmarks/cpu.py                                the Pythia 14M and 70M shapes, a few minutes
    python benchmarks/cpu.py --models 14M --rounds 15 --threads 8 --json cpu.json

A step is forward, backward, clipping to norm 1 and AdamW, in fp32, on 4 sequences of 512 tokens. See
docs/benchmarks.md for what is compared with what.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox.launch.main import script_main

SEQUENCE = 512
BATCH = 4


def main(arguments: list[str]) -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["14M", "70M"], metavar="NAME", help="default: 14M 70M")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file too")
    options = parser.parse_args(arguments)

    import torch

    from benchmarks.contestants import single_process
    from benchmarks.measure import machine
    from benchmarks.shapes import shapes_named

    shapes = shapes_named(options.models)
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"machine": machine(), "sequence": SEQUENCE, "batch": BATCH, "models": {}}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()), flush=True)
    with single_process(shapes[0].config(sequence=SEQUENCE)) as mesh:
        for shape in shapes:
            result = measure(shape, mesh, sequence=SEQUENCE, batch=BATCH, rounds=options.rounds)
            results["models"][shape.name] = result
            print("\n" + report(shape.name, result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure(shape: Any, mesh: Any, *, sequence: int, batch: int, rounds: int, warmup: int = 2) -> dict[str, Any]:
    """Time one shape.

    Args:
        shape: a `benchmarks.shapes.Shape`.
        mesh: from `benchmarks.contestants.single_process`.
        sequence: tokens of a sequence.
        batch: sequences of a step.
        rounds: timed steps of each contestant.
        warmup: steps before them.

    Returns:
        `rows` of the table by contestant, `gemm` in GFLOP/s by shape, `limit` the fastest of them, `load` averages of
        the machine before and after, `seconds` of every step.
    """
    import torch

    from benchmarks.contestants import Bare, Engine, Transformers
    from benchmarks.measure import Product, Speed, time_interleaved
    from neox.model.flops import flops_per_token

    load = [os.getloadavg()[0]]
    config = shape.config(sequence=sequence, micro_batch=batch)
    contestants = [Engine(config, mesh), Bare(config, mesh.device), Transformers(config, mesh.device)]
    tokens = torch.randint(shape.vocabulary, (batch, sequence + 1), generator=torch.Generator().manual_seed(0))
    m = batch * sequence
    products = [
        Product(2048, 2048, 2048),
        Product(m, shape.hidden, 4 * shape.hidden),
        Product(m, shape.hidden, shape.vocabulary),
    ]
    runs: dict[str, Any] = {c.name: lambda c=c: c.step(tokens) for c in contestants}
    runs |= {str(product): product.runner(mesh.device) for product in products}
    timings = time_interleaved(runs, device=mesh.device, rounds=rounds, warmup=warmup)
    gemm = {str(product): product.flops / timings[str(product)].best / 1e9 for product in products}
    limit = max(gemm, key=gemm.__getitem__)
    flops = {causal: flops_per_token(config.model, causal=causal) for causal in (True, False)}
    speeds = {
        c.name: Speed(m, timings[c.name], causal=flops[True], full=flops[False], limit=gemm[limit] * 1e9)
        for c in contestants
    }
    peer = speeds[Transformers.name]
    return {
        "rows": {name: speed.row(peer=peer) for name, speed in speeds.items()},
        "gemm": gemm,
        "limit": limit,
        "load": [*load, os.getloadavg()[0]],
        "seconds": {name: list(timing.seconds) for name, timing in timings.items()},
    }


def report(name: str, result: dict[str, Any]) -> str:
    """The table of one shape and the lines around it."""
    from benchmarks.measure import table

    gemm = ", ".join(f"{shape}: {rate:.0f}" for shape, rate in result["gemm"].items())
    before, after = result["load"]
    return "\n".join(
        [
            f"{name}, fp32, {BATCH} x {SEQUENCE} tokens; load average {before:.1f} before, {after:.1f} after",
            table([{"": contestant, **row} for contestant, row in result["rows"].items()]),
            f"matrix products, best GFLOP/s: {gemm}; the GEMM of the table is {result['limit']}",
        ]
    )


if __name__ == "__main__":
    sys.exit(script_main(main))
