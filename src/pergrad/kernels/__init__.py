"""Loops that torch has no op for, compiled on the user's machine if it has a C compiler.

Owns: `fused.c`, when and with what it is compiled (`build`), and how it is called (`fused`).
Does not know: factors. Everything here has an equivalent made of torch's ops, which serves where
nothing can be compiled; results differ by rounding alone.
"""

from pergrad.kernels.fused import Fused, Grid, Norms, fused, grid_of, why_not

__all__ = ["Fused", "Grid", "Norms", "fused", "grid_of", "why_not"]
