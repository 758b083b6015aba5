"""`Correlation`: weight gradients of convolutions, any number of dimensions, strided, grouped.

Owns: patches, and the products with a direction or weights that avoid holding them for the batch.
Does not know: ops, the formulas of norms (`norms`) and of products of two factors (`products`).

A transposed convolution is the same factor with its two tensors swapped.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from pergrad.factors import costs
from pergrad.factors.base import Factor
from pergrad.factors.constants import Constants, constants
from pergrad.factors.correlation import norms
from pergrad.factors.dense import Dense
from pergrad.factors.guard import SqNorms, held_against
from pergrad.factors.methods import choice
from pergrad.factors.methods.fused import kernel_for
from pergrad.factors.numeric import (
    Index,
    added,
    columns,
    result_dtype,
    row_dots,
    squared,
    tracing,
)
from pergrad.factors.outer import Outer
from pergrad.factors.outer import norms as outer_norms
from pergrad.factors.workspace import by_chunks, chunks, limit, scratch
from pergrad.kernels import Fused

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

    multilinear = True

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
    def stacks(self) -> Hashable:
        """Those of pictures of one size under the same kernel."""
        how = self.kernel, self.stride, self.padding, self.dilation, self.groups
        g, x = self.g, self.x
        return Correlation, self.shape, how, g.shape[1:], x.shape[1:], g.dtype, x.dtype

    def stacked(self, others: Sequence["Correlation"]) -> "Correlation":
        """One after the other along B."""
        parts = (self, *others)
        return Correlation(
            torch.cat([f.g for f in parts]),
            torch.cat([f.x for f in parts]),
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            shape=self.shape,
        )

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

    def window(self, rows: Index) -> Tensor:
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

    def still(self, rows: Index) -> Tensor:
        """g of some examples."""
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
        g = self.still(rows)
        n = len(g)
        N, T, p, _ = self.sizes
        left = g.reshape(n, N, p, T).transpose(2, 3)
        return Outer(left, self._patches(self.window(rows)), self.shape)

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
            for rows, grads in self.kernels():
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
    def window_size(self) -> int:
        """Positions of x that the kernel sees."""
        return prod(
            s * (o - 1) + e * (k - 1) + 1
            for s, o, e, k in zip(self.stride, self.out, self.dilation, self.kernel, strict=True)
        )

    @property
    def norm_method(self) -> str:
        """The name of one of `norms.METHODS`."""
        return self.method_by(self._costs).name

    def method_by(
        self, by: Constants, methods: tuple[choice.Method, ...] = norms.METHODS
    ) -> choice.Method:
        """The cheapest by these constants."""
        return choice.cheapest(methods, self.norm_sizes, by)

    @property
    def norm_sizes(self) -> norms.Sizes:
        """What the choice among them goes by."""
        N, T, p, d = self.sizes
        return norms.Sizes(
            outer_norms.Sizes(T, p, d, self._kernel is not None),
            N,
            self.window_size,
            prod(self.kernel),
            prod(self.x.shape[2:]),
            self.g[:1].numel() + self.x[:1].numel() if self.callable else None,
            self.shift_kernel is not None,
        )

    @property
    def shift_kernel(self) -> Fused | None:
        """The kernel for shifts, if it serves this one and has work for all threads."""
        kernel = self._kernel
        if kernel is None or self.batch * self.groups < torch.get_num_threads():
            return None
        room = kernel.shift_room(self.sizes[1], self.window_size) * self.dtype.itemsize
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
        """Multiply-adds of that method."""
        by = self._costs
        return self.batch * self.method_by(by).count(self.norm_sizes, by)

    def sq_norms(self) -> Tensor:
        """‖G[b]‖², by the cheapest of `norms.METHODS`."""
        return self.sq_norms_and_doubts().settled()

    def sq_norms_and_doubts(self) -> SqNorms:
        """A Gram's are in doubt where they cancel."""
        if self._empty:
            return SqNorms(self._zeros(self.batch))
        return self.sq_norms_by(self.method_by(self._costs))

    def sq_norms_by(self, method: choice.Method) -> SqNorms:
        """The same by one of `norms.METHODS`."""
        values, sizes = method.norms(self)
        return held_against(values, sizes, lambda rows: self._select(rows)._directly())

    def kernels(self) -> Iterator[tuple[slice, Tensor]]:
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

    def _directly(self) -> Tensor:
        def piece(rows: slice) -> Tensor:
            part = self.outer(rows)
            return outer_norms.direct(part.g, part.a)

        return by_chunks(self.batch, self.patch_bytes, piece, like=self._zeros(0),
                         budget=scratch(self.device))  # fmt: skip

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
            x = self.x[rows].to(self.dtype) if self._natural else self.window(rows)
            y = convolve(x, kernel, None, self.stride, padding, self.dilation, N)
            return row_dots(self.still(rows), y)

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
            g = self.still(rows)
            g = g * columns(c[rows], g)
            x = self.x[rows].to(self.dtype) if self._natural else self.window(rows)
            _, part, _ = torch.ops.aten.convolution_backward(
                g, x, like, None, self.stride, padding, self.dilation, False,
                zeros, self.groups, (False, True, False),
            )  # fmt: skip
            total = part if total is None else total + part
        return (like if total is None else total).reshape(self.shape)

    def second_moment(self, c: Tensor) -> Tensor:
        """From torch's own gradients for each example, or from patches, whichever is faster."""
        c = c.to(self.device, self.dtype)
        total = self._zeros(*self.shape)
        if self._empty:
            return total
        if norms.torch_forms_faster(self.norm_sizes, self._costs):
            for rows, grads in self.kernels():
                squares = squared(grads.flatten(1))
                total = added(total, torch.mv(squares.mT, c[rows]).reshape(self.shape))
            return total
        for rows in chunks(self.batch, self.patch_bytes, scratch(self.device)):
            total = added(total, self.outer(rows).second_moment(c[rows]))
        return total

    def formed(self) -> Factor:
        """The rows, if the norms form them anyway and they are not larger."""
        rows = self.smaller_formed and self.norm_method in ("direct", "convolution")
        return Dense(self.dense()) if rows else self

    def met_by(self, others: int) -> Factor:
        """As of the `Outer` over its patches."""
        _, T, p, d = self.sizes
        method = costs.outer_gram_method(others, self.batch, T, T, p, d, by=self._costs)
        return Dense(self.dense()) if method == "tiles" else self

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
