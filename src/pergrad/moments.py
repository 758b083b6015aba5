"""`second_moments`: the sum of squares of the per-example gradients, element by element.

Owns: the verb.
Does not know: how a factor squares its rows.
"""

from typing import Unpack

import torch
from torch import Tensor

from pergrad import inputs
from pergrad.api import _prepare, _result, _stream, result_dtype
from pergrad.engine.run import OptionsGiven
from pergrad.factors import Factor
from pergrad.inputs import Params


def second_moments(
    losses: Tensor,
    params: Params,
    weights: Tensor | float | None = None,
    **options: Unpack[OptionsGiven],
) -> dict[str, Tensor]:
    """The second moment of the per-example gradients, element by element.

        result[name] = sum over b of weights[b] * (d losses[b] / d params[name]) ** 2

    With `weights=1 / B` and losses that are negative log-likelihoods of the data
    this is the diagonal of the empirical Fisher information.

    Args:
        losses: (B,), as in `norms`.
        params: as in `norms`.
        weights: None for ones, a tensor (B,), or one number for all (1 / B for the mean).
        **options: retain_graph, create_graph, on_mixing, check_layout, chunk_bytes, as in `norms`.

    Returns:
        name -> tensor shaped as the parameter, in the order of the parameters, in the unit of
        `norms` squared; zeros for a parameter that the losses do not reach. The parameters' dtype,
        at least float32.

    Raises:
        UsageError: weights of another length or dtype; otherwise as in `norms`.
        MixedExamplesError, UnsupportedError: as in `norms`.

    Cost: a linear layer on one position for each example takes one product of squares, of the size
        of its weight's gradient in a plain backward pass; embeddings as in `norms`. All else is
        formed for a few examples at a time: a plain backward pass, and B times the
        parameter's size in memory traffic.
    Source: Kirkpatrick et al. 2017, arXiv:1612.00796, for the use; Dangel et al. 2020,
        arXiv:1912.10985, for linear layers.

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> pergrad.second_moments(model(x).squeeze(1), model)
        {'weight': tensor([[ 9., 17.]])}
    """
    named, losses, chosen = _prepare(losses, params, options)
    dtype = result_dtype(named)
    like = torch.ones(losses.shape, dtype=dtype, device=losses.device)
    c = inputs.row_weights(weights, like).to(dtype)
    sums: dict[str, Tensor] = {}

    def emit(name: str, factor: Factor) -> None:
        term = factor.second_moment(c.to(factor.device)).to(dtype)
        sums[name] = sums[name] + term if name in sums else term

    _stream(losses, named, chosen, emit, adding=True)
    return {
        name: _result(sums[name], chosen) if name in sums
        else torch.zeros(p.shape, dtype=dtype, device=p.device)
        for name, p in named.items()
    }  # fmt: skip
