"""Measure the slow kinds of models: pergrad's time in plain steps, and in loops over the examples.

    python benchmarks/worst.py                  # on an idle machine, three minutes
    python benchmarks/worst.py --only tokens

A plain step is a forward and a backward pass of the sum of all losses. A loop is a forward pass and
a backward pass for each loss. All three take turns; each share is of the same round.

Owns: the turns and the record. The models are in slow.py.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

import harness
import pergrad
from slow import KINDS, Kind
from turns import turn

LOOP_SECONDS = 6.0  # a loop that has taken so long in all takes no more turns


def measured(kind: Kind, rounds: int, *, tiny: bool) -> dict[str, Any]:
    """The record of one kind.

    Raises:
        SystemExit: the norms are not those of the loop.
    """
    torch.manual_seed(0)
    losses, params = kind.build(tiny)

    def plain() -> None:
        torch.autograd.grad(losses().sum(), params, allow_unused=True)

    def ours() -> torch.Tensor:
        return pergrad.norms(losses(), params, **kind.options)

    def loop() -> torch.Tensor:
        found = losses()
        rows = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
                for loss in found]  # fmt: skip
        squares = [sum(g.double().square().sum() for g in row if g is not None) for row in rows]
        return torch.stack(squares).sqrt()

    want = loop()
    error = float(((ours().double() - want) / want.max()).abs().max())
    if not error < harness.TOLERANCE:
        raise SystemExit(f"{kind.title}: error {error:.0e}")
    seconds: dict[str, list[float]] = {"plain": [], "pergrad": [], "loop": []}
    for _ in range(rounds):
        for name, call in (("plain", plain), ("pergrad", ours), ("loop", loop)):
            if name == "loop" and sum(seconds[name]) > LOOP_SECONDS:
                continue
            seconds[name].append(turn(call))
    in_steps = [b / a for a, b in zip(seconds["plain"], seconds["pergrad"], strict=True)]
    in_loops = [b / a for a, b in zip(seconds["loop"], seconds["pergrad"], strict=False)]
    return {
        "title": kind.title,
        "losses": len(want),
        "error": float(f"{error:.1e}"),
        "plain_milliseconds": harness.Spread.of(seconds["plain"]).record(3, 1e3),
        "plain_steps": harness.Spread.of(in_steps).record(3),
        "loops": harness.Spread.of(in_loops).record(4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="KIND", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try it out")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # that some are slow is what is measured
    found = {"environment": harness.environment(), "kinds": {}}
    for name in args.only:
        record = found["kinds"][name] = measured(KINDS[name], args.rounds, tiny=args.tiny)
        steps, loops = record["plain_steps"]["median"], record["loops"]["median"]
        print(f"{record['title']:<48} {steps:7.2f} plain steps, {loops:.2f} loops", flush=True)
    print(f"saved {harness.save('worst', found, args.out)}")


if __name__ == "__main__":
    main()
