"""`Correlation`: weight gradients of convolutions, any number of dimensions, strided, grouped.

Owns: patches, and the norms and products that avoid holding them for the whole batch.
Does not know: ops. A transposed convolution is the same factor with its two tensors swapped.
"""

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from pergrad.factors import costs, outer_norms
from pergrad.factors.base import Factor
from pergrad.factors.constants import Constants, constants
from pergrad.factors.fused_norms import fused_shifts, kernel_for
from pergrad.factors.guard import repaired
from pergrad.factors.numeric import (
    Index,
    columns,
    last_squares,
    result_dtype,
    row_dots,
    tracing,
)
from pergrad.factors.outer import Outer
from pergrad.factors.shift_norms import shifted
from pergrad.factors.workspace import by_chunks, chunks, limit, scratch
from pergrad.kernels import Fused, grid_of

# What a thread may need for the Grams of a convolution in the kernel.
_MOST_SHIFT_ROOM = 16 * 2**20


class Correlation(Factor):
    """G[b][o,c,k] = Σ_t g[b,o,t] x[b,c, stride t + dilation k - padding], within each group.

    Args:
        g: (B, O, *out), the tensor that lies still.
        x: (B, C, *in), the tensor that is shifted under it.
        kernel, stride, padding, dilation: one number per spatial dimension.
        groups: channels of g and x are cut into this many groups, group n of g sees group n of x.
        shape: the parameter's; its elements in order are those of (O, C / groups, *kernel).
    """

    guarded = True

    def __init__(
        self,
        g: Tensor,
        x: Tensor,
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int = 1,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        natural = (g.shape[1], x.shape[1] // groups, *kernel)
        shape = natural if shape is None else tuple(shape)
        if prod(shape) != prod(natural):
            raise ValueError(f"A kernel {natural} is no parameter of shape {shape}.")
        super().__init__(len(g), shape, g.device, result_dtype(g, x))
        self.g, self.x = g, x
        self.kernel, self.stride, self.padding = tuple(kernel), tuple(stride), tuple(padding)
        self.dilation, self.groups = tuple(dilation), groups

    @property
    def out(self) -> tuple[int, ...]:
        """Spatial sizes of g."""
        return tuple(self.g.shape[2:])

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(N, T, p, d) of the `Outer` that the patches would make."""
        p = self.g.shape[1] // self.groups
        d = self.x.shape[1] // self.groups * prod(self.kernel)
        return self.groups, prod(self.out), p, d

    def _window(self, rows: Index) -> Tensor:
        """x padded, and cut to just what the kernel sees."""
        x = self.x[rows].to(self.dtype)
        around: list[int] = []
        for size, stride, pad, dilation, kernel, out in zip(
            x.shape[2:], self.stride, self.padding, self.dilation, self.kernel, self.out,
            strict=True,
        ):  # fmt: skip
            needed = stride * (out - 1) + dilation * (kernel - 1) + 1
            around = [pad, needed - size - pad, *around]
        return functional.pad(x, around) if any(around) else x

    def _still(self, rows: Index) -> Tensor:
        return self.g[rows].to(self.dtype)

    def _patches(self, window: Tensor) -> Tensor:
        """(n, N, T, d)."""
        window = window.contiguous()
        n, channels = window.shape[:2]
        N = self.groups
        step = window.stride()
        sizes = (n, N, channels // N, *self.kernel, *self.out)
        strides = (
            step[0],
            step[1] * (channels // N),
            step[1],
            *(s * t for s, t in zip(self.dilation, step[2:], strict=True)),
            *(s * t for s, t in zip(self.stride, step[2:], strict=True)),
        )
        view = window.as_strided(sizes, strides, window.storage_offset())
        # copied with the positions innermost, where whole lines of pixels lie side by side
        return view.reshape(n, N, self.sizes[3], self.sizes[1]).transpose(2, 3)

    def outer(self, rows: Index) -> Outer:
        """The same gradients of some examples over explicit patches."""
        g = self._still(rows)
        n = len(g)
        N, T, p, _ = self.sizes
        left = g.reshape(n, N, p, T).transpose(2, 3)
        return Outer(left, self._patches(self._window(rows)), self.shape)

    @property
    def _empty(self) -> bool:
        """Whether there is nothing to correlate."""
        return self.g.numel() == 0 or self.x.numel() == 0

    @property
    def patch_bytes(self) -> int:
        """What the patches of one example take, and the gradient beside them."""
        N, T, p, d = self.sizes
        return N * T * (p + d) * self.dtype.itemsize

    def dense(self) -> Tensor:
        """(B, *shape)."""
        if self._empty:
            return self._zeros(self.batch, *self.shape)
        if self.norm_method == "convolution":
            out = self.g.new_empty((self.batch, *self.shape), dtype=self.dtype)
            for rows, grads in self._kernels():
                out[rows] = grads.reshape(len(grads), *self.shape)
            return out
        each = self.patch_bytes + self.bytes_per_row
        return by_chunks(self.batch, each, lambda rows: self.outer(rows).dense(),
                         like=self._zeros(0), tail=self.shape)  # fmt: skip

    def tile(self, lo: int, hi: int) -> Tensor:
        """(B, (hi - lo) * C)."""
        wide = self.matrix_shape[1]
        if self._empty:
            return self._zeros(self.batch, (hi - lo) * wide)
        return by_chunks(self.batch, self.patch_bytes,
                         lambda rows: self.outer(rows).tile(lo, hi),
                         like=self._zeros(0), tail=((hi - lo) * wide,))  # fmt: skip

    @property
    def _window_size(self) -> int:
        """Positions of x that the kernel sees."""
        return prod(
            s * (o - 1) + e * (k - 1) + 1
            for s, o, e, k in zip(self.stride, self.out, self.dilation, self.kernel, strict=True)
        )

    @property
    def norm_method(self) -> str:
        """One of rows, direct, gram, fused, shift, fused shift and convolution."""
        return self.norm_method_by(self._costs)

    def norm_method_by(self, by: Constants) -> str:
        """The cheapest by these constants."""
        N, T, p, d = self.sizes
        call = self.g[:1].numel() + self.x[:1].numel() if self.callable else None
        return costs.correlation_norm_method(
            N, T, self._window_size, p, d, prod(self.kernel), pixels=prod(self.x.shape[2:]),
            call=call, by=by, fused=self._kernel is not None,
            fused_shift=self.shift_kernel is not None,
        )  # fmt: skip

    @property
    def shift_kernel(self) -> Fused | None:
        """The kernel for shifts, if it serves this one and has work for all threads."""
        kernel = self._kernel
        if kernel is None or self.batch * self.groups < torch.get_num_threads():
            return None
        room = kernel.shift_room(self.sizes[1], self._window_size) * self.dtype.itemsize
        return kernel if room <= _MOST_SHIFT_ROOM else None

    @property
    def _kernel(self) -> Fused | None:
        return kernel_for(self.g, self.x)

    @property
    def _costs(self) -> Constants:
        return constants(self.device, self.dtype)

    @property
    def _natural(self) -> bool:
        """Whether g has the size that a convolution of x would return."""
        sizes = zip(
            self.x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True
        )
        return self.out == tuple((n + 2 * p - e * (k - 1) - 1) // s + 1 for n, k, s, p, e in sizes)

    @property
    def callable(self) -> bool:
        """Whether torch's own weight gradient may take the place of the patches."""
        return (
            self.dtype == torch.float32  # other dtypes have slow kernels
            and self.device.type == "cpu"  # a call for each example would starve a GPU
            and len(self.out) <= 3
            and self._natural
            and not tracing(self.g, self.x)
        )

    @property
    def norm_cost(self) -> int:
        """Multiply-adds per example."""
        N, T, p, d = self.sizes
        k = prod(self.kernel)
        if self.norm_method == "shift":
            return N * costs.shift_norm_cost(T, self._window_size, p, d, k, self._costs)
        if self.norm_method == "fused shift":
            return N * costs.fused_shift_norm_cost(T, prod(self.x.shape[2:]), p, d, k)
        if self.norm_method == "convolution":
            return N * costs.direct_norm_cost(T, p, d)
        fused = self._kernel is not None
        return N * costs.outer_norm_cost(T, p, d, by=self._costs, fused=fused)

    def sq_norms(self) -> Tensor:
        """‖G[b]‖², by the method that `costs.correlation_norm_method` chooses."""
        return self._zeros(self.batch) if self._empty else self.sq_norms_by(self.norm_method)

    def sq_norms_by(self, method: str) -> Tensor:
        """‖G[b]‖² by one of `norm_method`'s methods."""
        sizes: Tensor | None
        if method == "convolution":
            return self._by_convolutions()
        if method == "shift":
            norms, sizes = self._by_shifts()
        elif method == "fused shift":
            norms, sizes = self._by_fused_shifts()
        else:
            norms, sizes = self._by_patches()
        if sizes is None:
            return norms
        return repaired(norms, sizes, lambda rows: self._select(rows)._directly())

    def _kernels(self) -> Iterator[tuple[slice, Tensor]]:
        """torch's own gradient for some examples at a time: (n, O, C / groups, *kernel).

        The examples are groups of channels of one convolution. That lays out no patches, costs a
        call for all of them, and keeps the threads busier than one example would.
        """
        outputs, inputs = self.g.shape[1], self.x.shape[1]
        natural = (outputs, inputs // self.groups, *self.kernel)
        held = (self.g[:1].numel() + self.x[:1].numel()) * self.dtype.itemsize
        budget = scratch(self.device)
        for rows in chunks(self.batch, max(self.bytes_per_row, held // 8), budget):
            g, x = self.g[rows].to(self.dtype), self.x[rows].to(self.dtype)
            n = len(g)
            _, kernels, _ = torch.ops.aten.convolution_backward.default(
                g.reshape(1, n * outputs, *self.out), x.reshape(1, n * inputs, *x.shape[2:]),
                g.new_empty(n * outputs, *natural[1:]), None,
                self.stride, self.padding, self.dilation, False, (0,) * len(self.out),
                n * self.groups, (False, True, False),
            )  # fmt: skip
            yield rows, kernels.view(n, *natural)

    def _by_convolutions(self) -> Tensor:
        # rows of a kernel are short enough for one running sum each, see `LONG_ROW`
        found = [last_squares(grads.flatten(2), self.dtype) for _, grads in self._kernels()]
        return torch.cat(found).sum(1)

    def _by_patches(self) -> tuple[Tensor, Tensor | None]:
        pieces = chunks(self.batch, self.patch_bytes, scratch(self.device))
        outers = map(self.outer, pieces)
        found = [outer_norms.unrepaired(part.g, part.a) for part in outers]
        norms = torch.cat([one for one, _ in found])
        if all(size is None for _, size in found):
            return norms, None
        # no size at all where no Gram was taken
        sizes = [torch.zeros_like(one) if size is None else size for one, size in found]
        return norms, torch.cat(sizes)

    def _directly(self) -> Tensor:
        def piece(rows: slice) -> Tensor:
            part = self.outer(rows)
            return outer_norms.direct(part.g, part.a)

        return by_chunks(self.batch, self.patch_bytes, piece, like=self._zeros(0),
                         budget=scratch(self.device))  # fmt: skip

    def _by_fused_shifts(self) -> tuple[Tensor, Tensor | None]:
        kernel = self.shift_kernel
        assert kernel is not None
        N, T, p, _ = self.sizes
        grid = grid_of(
            tuple(self.x.shape[2:]), self.out, self.kernel, self.stride, self.padding, self.dilation
        )
        g = self.g.reshape(self.batch, N, p, T)
        x = self.x.reshape(self.batch, N, self.x.shape[1] // N, -1)
        norms, sizes, trusted = fused_shifts(kernel, g.mT, x.mT, grid)
        return norms, None if trusted else sizes

    def _by_shifts(self) -> tuple[Tensor, Tensor]:
        N, T, _, _ = self.sizes

        def piece(rows: slice) -> Tensor:
            g, x = self._still(rows), self._window(rows)
            return shifted(g, x, N, self.kernel, self.stride, self.dilation)

        each = N * (self._window_size**2 + 2 * T * T) * self.dtype.itemsize
        both = by_chunks(self.batch, each, piece, like=self._zeros(0), tail=(2,),
                         budget=scratch(self.device))  # fmt: skip
        return both[:, 0], both[:, 1]

    def matvec(self, v: Tensor) -> Tensor:
        """g · (x convolved with v): one convolution as in a forward pass."""
        N, T, p, _ = self.sizes
        if self._empty:
            return self._zeros(self.batch)
        kernel = v.to(self.device, self.dtype).reshape(
            self.g.shape[1], self.x.shape[1] // N, *self.kernel
        )
        if len(self.out) > 3:
            return by_chunks(
                self.batch,
                self.patch_bytes,
                lambda rows: self.outer(rows).matvec(v),
                like=self._zeros(0),
            )
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(self.out) - 1]

        padding = self.padding if self._natural else 0

        def piece(rows: slice) -> Tensor:
            x = self.x[rows].to(self.dtype) if self._natural else self._window(rows)
            y = convolve(x, kernel, None, self.stride, padding, self.dilation, N)
            return row_dots(self._still(rows), y)

        each = (2 * self.x[:1].numel() + 3 * N * T * p) * self.dtype.itemsize
        return by_chunks(self.batch, each, piece, like=self._zeros(0))

    def weighted_sum(self, c: Tensor) -> Tensor:
        """One weight gradient as in a plain backward pass, of c[b] g[b]."""
        c = c.to(self.device, self.dtype)
        if self._empty:
            return self._zeros(*self.shape)
        if len(self.out) > 3:
            parts = chunks(self.batch, self.patch_bytes, limit(self.device))
            return sum((self.outer(rows).weighted_sum(c[rows]) for rows in parts),
                       self._zeros(*self.shape))  # fmt: skip
        like = self._zeros(self.g.shape[1], self.x.shape[1] // self.groups, *self.kernel)
        total: Tensor | None = None
        each = (2 * self.x[:1].numel() + 2 * self.g[:1].numel()) * self.dtype.itemsize
        zeros = (0,) * len(self.out)
        padding = self.padding if self._natural else zeros
        for rows in chunks(self.batch, each, limit(self.device)):
            g = self._still(rows)
            g = g * columns(c[rows], g)
            x = self.x[rows].to(self.dtype) if self._natural else self._window(rows)
            _, part, _ = torch.ops.aten.convolution_backward(
                g, x, like, None, self.stride, padding, self.dilation, False,
                zeros, self.groups, (False, True, False),
            )  # fmt: skip
            total = part if total is None else total + part
        return (like if total is None else total).reshape(self.shape)

    def _like(self, g: Tensor, x: Tensor) -> "Correlation":
        return Correlation(
            g,
            x,
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            shape=self.shape,
        )

    def scale(self, c: Tensor) -> "Correlation":
        """The smaller of g and x times c[b]."""
        c = c.to(self.device, self.dtype)
        if self.x.numel() < self.g.numel():
            return self._like(self.g, self.x.to(self.dtype) * columns(c, self.x))
        return self._like(self.g.to(self.dtype) * columns(c, self.g), self.x)

    def _select(self, index: Index) -> "Correlation":
        return self._like(self.g[index], self.x[index])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Correlation":
        return self._like(change(self.g), change(self.x))

    def tensors(self) -> tuple[Tensor, ...]:
        """g and x."""
        return (self.g, self.x)
