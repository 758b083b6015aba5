"""Gradient matrices out of others: rows put together, and read from a file.

Owns: `concatenate` and `load_gradients`.
Does not know: how factors are joined, or written down.
"""

from collections.abc import Sequence
from os import PathLike

from pergrad import gradient_files
from pergrad.errors import UsageError
from pergrad.factors import placed_one_by_one
from pergrad.matrix import GradientMatrix


def concatenate(matrices: Sequence[GradientMatrix]) -> GradientMatrix:
    """The rows of several matrices, one after the other, as one matrix.

    Factors of one kind become one factor, in memory of their own; others are kept side by side.

    Args:
        matrices: at least one, about the same parameters, on one device.

    Returns:
        GradientMatrix (B_1 + B_2 + ..., P).

    Raises:
        UsageError: they are none, not matrices, or differ in their parameters or devices.

    Cost: a copy of the factors.

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(3, 1)
        >>> J, K = (pergrad.gradients(model(torch.randn(b, 3)).squeeze(1), model) for b in (5, 2))
        >>> pergrad.concatenate([J, K]).shape
        torch.Size([7, 4])
    """
    if isinstance(matrices, GradientMatrix) or not all(
        isinstance(each, GradientMatrix) for each in matrices
    ):
        raise UsageError("concatenate takes a list of GradientMatrix: pergrad.concatenate([J, K]).")
    if not matrices:
        raise UsageError("concatenate got no matrix. Pass at least one: its parameters are needed.")
    first, *others = matrices
    for each in matrices:
        first._check_match(each)
        each._check_versions()
    if not others:
        return first
    batch = sum(len(each) for each in matrices)
    pieces = {name: [each._factors[name] for each in matrices] for name in first.names}
    joined = {name: placed_one_by_one(factors) for name, factors in pieces.items()}
    return GradientMatrix(joined, batch, first._chunk_bytes)


def load_gradients(path: str | PathLike[str]) -> GradientMatrix:
    """The matrix that `J.save(path)` wrote, on the CPU. Nothing is unpickled.

    Args:
        path: the file.

    Returns:
        GradientMatrix, with the same numbers.

    Raises:
        StoreError: the file cannot be read, or is not one that `J.save` wrote.
        MissingExtraError: `pip install 'pergrad[safetensors]'` brings what is missing.

        >>> import tempfile, torch, pergrad
        >>> model = torch.nn.Linear(3, 1)
        >>> J = pergrad.gradients(model(torch.randn(5, 3)).squeeze(1), model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     J.save(f"{folder}/J.safetensors")
        ...     K = pergrad.load_gradients(f"{folder}/J.safetensors")
        >>> torch.equal(J.flat(), K.flat())
        True
    """
    return GradientMatrix(*gradient_files.read(path))
