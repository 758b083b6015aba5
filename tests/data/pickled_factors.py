"""Writes pickled_factors.pkl: matrices as the release of before the table of products pickled them.

It ran with that release (git 4290621), whose factors held `Notes`; its classes and their paths are
what has to load. `python tests/data/pickled_factors.py` with another release would write another
file, and test nothing.
"""

import functools
import pickle
from pathlib import Path

import torch

import pergrad
from pergrad.factors import (
    Computed,
    Correlation,
    Dense,
    Embedded,
    KeptGram,
    Notes,
    Outer,
    Placed,
    Pulled,
    Rows,
    Scaled,
    Sum,
    Summed,
    Zero,
    mapped,
)  # fmt: skip
from pergrad.factors.lazy import Sandwich
from pergrad.matrix import GradientMatrix

torch.manual_seed(0)
B, T, V, D = 3, 2, 4, 2


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(B, *shape, dtype=torch.float64)


def outer() -> Outer:
    return Outer(rows(T, V), rows(T, D))


g, a = rows(1, T, V), rows(1, T, D)
notes = Notes(g, read=a, version=0, kept=KeptGram(2))
weight, bias = Outer(g, a, notes=notes), Summed(g, (V,), notes)
weight.sq_norms()
values = rows(V, D)
image = Correlation(rows(V, 3), rows(1, 4), kernel=(D,), stride=(1,), padding=(0,), dilation=(1,),
                    shape=(V, D))  # fmt: skip
table = Rows(torch.tensor([[0, 2], [-1, 1], [3, 3]]), rows(T, D), (V, D))
turned = mapped(
    Outer(rows(T, D), rows(T, V)), (("view", (D, V, 1)), ("permute", (1, 2, 0)), ("view", (V, D)))
)
factors = {
    "outer": weight,
    "summed": bias,
    "correlation": image,
    "rows": table,
    "dense": Dense(values),
    "zero": Zero(B, (V, D), dtype=torch.float64),
    "sum": Sum([outer(), table, image]),
    "placed": Placed(Outer(g[[0, 2], 0], a[[0, 2], 0]), torch.tensor([0, 2]), B),
    "mapped": turned,
    "embedded": Embedded(Outer(rows(T, 1), rows(T, D)), (V, D), (0, 1, 2)),
    "scaled": Scaled(outer(), torch.randn(V, D, dtype=torch.float64)),
    "pulled": Pulled(image, Sandwich(torch.randn(D, D, dtype=torch.float64), None), (V, D)),
    "computed": Computed(B, (V, D), functools.partial(torch.index_select, values, 0), values),
}
model = torch.nn.Sequential(torch.nn.Linear(D, V), torch.nn.Tanh(), torch.nn.Linear(V, 1)).double()
x = rows(T, D)
matrices = {
    "by hand": GradientMatrix(factors, B),
    "of a model": pergrad.gradients(model(x).sum((1, 2)), model),
}
with Path(__file__).with_suffix(".pkl").open("wb") as file:
    pickle.dump({name: (J, J.dense()) for name, J in matrices.items()}, file)
