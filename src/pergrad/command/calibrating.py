"""The command that measures which methods are fastest on this machine.

Owns: `calibrate` and its options, and what is printed.
Does not know: what is measured, or where it is kept.
"""

from enum import StrEnum
from typing import Annotated

import typer

import pergrad
from pergrad.command import printing
from pergrad.command.common import AsJson
from pergrad.scans.rows import as_table


class Precision(StrEnum):
    """What is multiplied. Half precision is multiplied in float32."""

    float32 = "float32"
    float64 = "float64"


def calibrate(
    device: Annotated[str, typer.Option(help="Where to measure: cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[Precision, typer.Option(help="Of the products.")] = Precision.float32,
    as_json: AsJson = False,
) -> None:
    """Measure which of its exact methods are fastest on this machine, in a few seconds.

    \b
    Once per machine and device, with the number of threads that you work with. It changes how
    long pergrad takes; of the results, only the rounding. Nothing else should run meanwhile.
    What was measured is kept in ~/.cache/pergrad/costs, or in the folder that the environment
    variable PERGRAD_COSTS names; delete it to undo this. It also says whether the kernels that
    pergrad compiles with your C compiler are there, and if not, why.

    \b
    Examples:
        pergrad calibrate
        OMP_NUM_THREADS=8 pergrad calibrate
        pergrad calibrate --device cuda --json
    """
    import torch

    found = pergrad.calibrate(device, getattr(torch, dtype.value))
    if as_json:
        typer.echo(
            printing.as_json(
                {
                    "device": found.device,
                    "dtype": dtype.value,
                    "loss": found.loss,
                    "loss_before": found.loss_before,
                    "constants": found.constants,
                    "file": None if found.file is None else str(found.file),
                    "no_kernel": found.no_kernel,
                }
            )
        )
        return
    rows = [
        {
            "product": case.what,
            **{f"{name} ms": float(f"{1000 * t:.3g}") for name, t in case.seconds.items()},
        }
        for case in found.cases
    ]
    for names in {tuple(row): None for row in rows}:
        typer.echo(as_table([row for row in rows if tuple(row) == names]) + "\n")
    typer.echo(
        f"{found.device}, {dtype.value}: the choice of method loses {found.loss:.1%} of the time "
        f"to the fastest one ({found.loss_before:.1%} before).\n"
        f"Compiled kernels: {'yes' if found.no_kernel is None else 'no, ' + found.no_kernel}.\n"
        f"Kept in {found.file or 'this process only'}."
    )
