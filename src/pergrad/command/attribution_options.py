"""Options that the commands of attribution share.

Owns: their spelling, types and help.
Does not know: the commands.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Kind(StrEnum):
    """How much of the curvature is kept."""

    ekfac = "ekfac"
    kfac = "kfac"
    shampoo = "shampoo"
    diagonal = "diagonal"


class Mode(StrEnum):
    """The mode that the model is put into."""

    eval = "eval"
    as_is = "as-is"


class Method(StrEnum):
    """A method that does not follow from other options."""

    kernel = "kernel"


class Groups(StrEnum):
    """What a score is taken apart by."""

    layer = "layer"


class Engine(StrEnum):
    """Where it is computed."""

    local = "local"
    ray = "ray"
    torchrun = "torchrun"


class Mixing(StrEnum):
    """What happens where examples influence each other."""

    refuse = "raise"
    exact = "exact"


BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Examples in a batch; by default what memory allows.",
        show_default=False,
    ),
]  # fmt: skip
Seed = Annotated[int, typer.Option(help="Of random numbers that are drawn.")]
AsMode = Annotated[Mode, typer.Option(help="The mode of the model; it is put back afterwards.")]
OnMixing = Annotated[
    Mixing,
    typer.Option(help="exact: pay for examples that influence each other, as in batch norm."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
Queries = Annotated[
    str,
    typer.Option(
        metavar="FILE.py:FUNCTION",
        help="What is asked about: the function, called with the Job, returns a data set with "
        "items as in the job's, or a Job whose losses are a measurement.",
    ),
]
Out = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="DIR", help="Where the results go. Made if it is new."),
]
OnEngine = Annotated[
    Engine,
    typer.Option(
        "--engine", help="ray: by several processes, or a cluster. torchrun: by each rank its "
        "share, after `torchrun --nproc-per-node N -m pergrad`.",
    ),
]  # fmt: skip
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="ray: how many. By default one for each GPU, or each CPU.",
        show_default=False,
    ),
]  # fmt: skip
Address = Annotated[
    str | None,
    typer.Option(help="ray: a cluster's address. By default this machine.", show_default=False),
]
