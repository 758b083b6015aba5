"""On a GPU: time by CUDA events, memory by its allocator, and whether the CPU waits for it.

    python benchmarks/gpu.py                         # everything; writes results/gpu-*.json
    python benchmarks/gpu.py --only W1 GPT2 --contestants plain pergrad
    python benchmarks/gpu.py --device cpu --tiny     # that it runs at all

One process, since a GPU's memory is counted by its allocator and given back between contestants. In
each round all are asked in turn, in a new random order; a share is the time of one contestant
divided by that of the plain step in the same round. Before that, what is computed is compared with
one backward pass for each of three examples.

Owns: the list of workloads for a GPU, and how one is measured there.
Does not know: what the contestants do.
"""

import argparse
import gc
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import harness
import pergrad
from child import short
from contestants import CONTESTANTS
from workloads import REGISTRY, Step
from workloads.gpt import gpt
from workloads.resnet import resnet50

BY_DEFAULT = ("plain", "pergrad", "floor", "vmap")


def in_half(step: Step) -> Step:
    """The same under bfloat16 autocast."""

    def loss(call: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        with torch.autocast(batch[0].device.type, torch.bfloat16):
            return step.loss(call, *batch).float()

    return replace(step, loss=loss)


def gpt2(tiny: bool) -> Step:
    """GPT-2 small: 12 layers of width 768, 12 heads, 50,257 tokens, tied; 8 texts of 1,024."""
    return in_half(gpt(8, 1024, vocabulary=50_257, layers=1 if tiny else 12, tied=True, tiny=tiny))


WORKLOADS: dict[str, Callable[[bool], Step]] = {
    **{name: REGISTRY[name].build
       for name in ("W1-mlp", "W2-gpt-T128", "W2-gpt-T512", "W2-gpt-T1024", "W4-resnet",
                    "W6-encoder")},
    "GPT2-bf16": gpt2,
    "ResNet50-224": lambda tiny: resnet50(32, tiny),
}  # fmt: skip


def on(device: torch.device, step: Step) -> Step:
    return replace(
        step,
        model=step.model.to(device),
        batch=tuple(t.to(device) for t in step.batch),
        reference=None,
    )


def error(step: Step, norms: Tensor) -> float:
    """The largest deviation from one backward pass for each of three examples, alike computed."""
    losses, params = step.losses(), list(step.params().values())
    worst = 0.0
    for b in range(min(3, len(step))):
        grads = torch.autograd.grad(losses[b], params, retain_graph=True, allow_unused=True)
        squares = [g.double().square().sum() for g in grads if g is not None]
        want = torch.stack(squares).sum().sqrt()
        worst = max(worst, float((norms[b].double() - want).abs() / want))
    return worst


def reads(run: Callable[[Any], Any], batch: Any) -> int | None:
    """How often the CPU waits for the GPU in one call, by what torch itself notices."""
    if not batch[0].is_cuda:
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in found)


def milliseconds(run: Callable[[Any], Any], batch: Any) -> float:
    if not batch[0].is_cuda:
        start = time.perf_counter()
        run(batch)
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run(batch)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak(run: Callable[[Any], Any], batch: Any) -> int | None:
    """Bytes of the allocator at most in one call, with model and batch."""
    if not batch[0].is_cuda:
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run(batch)
    return torch.cuda.max_memory_allocated()


def measure(step: Step, names: list[str], rounds: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    running: dict[str, Callable[[Any], Any]] = {}
    for name in names:
        try:
            run = CONTESTANTS[name].function("norms")(step)
            found = run(step.batch)
            run(step.batch)
            rows[name] = {
                "error": error(step, found) if isinstance(found, Tensor) else None,
                "peak": peak(run, step.batch),
                "waits": reads(run, step.batch) if name == "pergrad" else None,
            }
            running[name] = run
        except Exception as failure:  # whatever it is, the table shows it
            rows[name] = {"failure": short(failure)}
    turns: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name in random.sample(list(running), len(running)):
            turns[name].append(milliseconds(running[name], step.batch))
    for name, times in turns.items():
        shares = harness.Spread.of(
            [own / unit for own, unit in zip(times, turns["plain"], strict=True)]
        )
        rows[name] |= {
            "milliseconds": statistics.median(times),
            "ratio": shares.median,
            "quartiles": [shares.low, shares.high],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help=", ".join(WORKLOADS))
    parser.add_argument("--contestants", nargs="+", default=BY_DEFAULT)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    names = ["plain", *(n for n in args.contestants if n != "plain")]
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "workloads": {},
                             "pergrad": pergrad.__version__}  # fmt: skip
    for title, build in WORKLOADS.items():
        if args.only and not title.startswith(tuple(args.only)):
            continue
        rows = measure(on(device, build(args.tiny)), names, args.rounds)
        found["workloads"][title] = rows
        print(title)
        for contestant, row in rows.items():
            print(f"  {contestant:<9}", json.dumps(row), flush=True)
    path = args.out / f"gpu-{'-'.join(name.split()).lower()}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
