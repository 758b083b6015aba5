"""What the norms of one factor leave for those of others in the same pass.

Owns: `Notes` beside an `Outer`, and `KeptGram`, the Gram of an input that several ops read.
Does not know: how either is computed.
"""

import torch
from torch import Tensor


class KeptGram:
    """A Aᵀ, (n, T, T) in rows of blocks, formed for the first of several readers of A.

    Query, key and value projections read the same input, so do a gate and its values: three uses,
    one Gram of A. It takes no more room than A.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers  # of them all
        self.left = readers  # of those that have not been served
        self._input: Tensor | None = None
        self._mark: tuple[object, ...] = ()
        self._blocks: list[Tensor] = []

    def blocks(self, a: Tensor, version: int, form: str = "rows") -> list[Tensor] | None:
        """Those of this very memory, as it was; None if they have not been formed."""
        if self._input is None:
            return None
        if self._mark == (form, *_mark(a, version)):
            return self._blocks
        # Whoever hands out what was saved makes copies of it, so nobody will find these.
        self.readers = 1
        self._forget()
        self.left = 0
        return None

    def room(
        self, a: Tensor, shapes: list[tuple[int, int, int]], dtype: torch.dtype
    ) -> list[Tensor] | None:
        """Memory for the blocks; None if nobody will read them or they take more than A does."""
        numbers = sum(n * rows * columns for n, rows, columns in shapes)
        if self.left < 2 or numbers * dtype.itemsize > a.numel() * a.element_size():
            return None
        return [torch.empty(shape, dtype=dtype, device=a.device) for shape in shapes]

    def keep(self, a: Tensor, version: int, blocks: list[Tensor], form: str = "rows") -> None:
        """For the readers that are left. Holding A itself, so that its memory stays its own.

        `form` says how the numbers lie in the blocks: "rows" of the Gram, or the kernel's "tiles".
        """
        if self.left > 1:
            self._input, self._mark, self._blocks = a, (form, *_mark(a, version)), blocks

    def served(self) -> None:
        """One reader less."""
        self.left -= 1
        if self.left <= 0:
            self._forget()

    def _forget(self) -> None:
        self._input, self._mark, self._blocks = None, (), []


def _mark(a: Tensor, version: int) -> tuple[object, ...]:
    """Equal only for the same memory, read alike, not written to in between.

    And on a GPU for the same stream of work: another one may not have got there yet.
    """
    stream = torch.cuda.current_stream(a.device) if a.is_cuda else None
    return (a.data_ptr(), a.shape, a.stride(), a.dtype, a.device, version, stream)


class Notes:
    """Beside one `Outer`: what somebody has asked to know, and what others know already.

    ‖Σ_t g_t‖², a bias' squared norm, is the sum of all entries of the Gram of g, which the weight's
    norm forms anyway. It is noted for the side `summed`.
    """

    def __init__(
        self,
        summed: Tensor | None = None,
        *,
        read: Tensor | None = None,
        version: int = 0,
        kept: KeptGram | None = None,
    ) -> None:
        self.summed = summed
        self.sq_norms: Tensor | None = None  # (B,)
        self.sizes: Tensor | None = None  # (B,): T |G|², as in `cancels`; None if to be trusted
        self.read = read  # the side that other ops read too
        self.version = version  # of its memory
        self.kept = kept

    def blocks(self, form: str) -> list[Tensor] | None:
        """Of the Gram of the side `read`, if another reader has formed it."""
        if self.kept is None or self.read is None:
            return None
        return self.kept.blocks(self.read, self.version, form)

    def room(self, shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> list[Tensor] | None:
        """Memory for its blocks, if others will read them."""
        if self.kept is None or self.read is None:
            return None
        return self.kept.room(self.read, shapes, dtype)

    def keep(self, blocks: list[Tensor], form: str) -> None:
        """What has been written to that memory, for the others."""
        if self.kept is not None and self.read is not None:
            self.kept.keep(self.read, self.version, blocks, form)
