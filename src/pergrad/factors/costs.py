"""Which of several exact methods to use: counts of multiply-adds, and nothing else.

Owns: what norms cost, and the choice of a method for products of `Outer` and `Rows`.
Does not know: tensors; what a machine is good at (`constants`); the choice of a method for norms
(`methods.choice`).

Dimensions: B and K examples, T and S positions, p outputs, d inputs.

The rule in the literature, 2 T² <= d p, compares what is *stored*; here nothing is, so the
arithmetic decides.
"""

from pergrad.factors.constants import DEFAULT, Constants

# A Gram's symmetric half is computed in rows of blocks, each a matrix product of its own. Two
# blocks pay from 128 positions on, more of them from 128 positions each.
GRAM_BLOCK = 128
GRAM_BLOCKS = 8
FUSED_TILE = 16  # rows, of which the kernel forms both halves


def gram_blocks(T: int) -> int:
    """Rows of blocks in which the symmetric Gram of T positions is computed."""
    return max(2 if T >= GRAM_BLOCK else 1, min(GRAM_BLOCKS, T // GRAM_BLOCK))


def row_norm_cost(p: int, d: int) -> int:
    """|g|² |a|², one position: p + d."""
    return p + d


def gram_norm_cost(T: int, p: int, d: int) -> int:
    """Σ_ts (g_t·g_s)(a_t·a_s), half by symmetry (less, in k blocks): T² (p + d) (k + 1) / 2k."""
    k = gram_blocks(T)
    return T * T * (p + d) * (k + 1) // (2 * k)


def fused_norm_cost(T: int, p: int, d: int) -> int:
    """The same by the compiled kernel, which needs no blocks to leave the lower half out."""
    return T * (T + FUSED_TILE) * (p + d) // 2


def direct_norm_cost(T: int, p: int, d: int) -> int:
    """Form Gᵀ A, then square it: (T + 1) p d."""
    return (T + 1) * p * d


def outer_dot_method(T: int, S: int, p: int, d: int, by: Constants = DEFAULT) -> str:
    """Row b with row b of two Outers.

    "gram": T S (p + d), and its guard the norms of both, at most (T² + S²) (p + d).
    "direct": form one and pass the other through it, T p d + S p d.
    """
    if T <= 1 and S <= 1:
        return "rows"
    gram = by.dot_overhead * (T * S + T * T + S * S) * (p + d + by.gram_elementwise)
    return "gram" if gram < (T + S) * p * d else "direct"


def outer_gram_method(
    B: int, K: int, T: int, S: int, p: int, d: int, *, same: bool = False, by: Constants = DEFAULT
) -> str:
    """All pairs of two Outers.

    "rows": T = S = 1. "gram": B K T S (p + d), half if `same`. "tiles": form both sides a tile at
    a time, (B T + K S) p d (once if `same`), then multiply, B K p d.
    """
    if T <= 1 and S <= 1:
        return "rows"
    pairs = B * K * T * S / (2 if same else 1)
    gram = by.gram_overhead * pairs * (p + d + by.gram_elementwise)
    tiles = (B * T + (0 if same else K * S) + B * K) * p * d
    return "gram" if gram < tiles else "tiles"


def join_is_cheaper(
    pairs: int, B: int, K: int, ids: int, width: int, by: Constants = DEFAULT
) -> bool:
    """All pairs of two Rows: join equal ids, or a product of tables of all ids.

    `pairs` products of rows, or tables of B + K examples by `ids` rows, and their product.
    """
    join = pairs * (by.pair_overhead + width * by.gather_overhead)
    return join < ids * width * ((B + K) * by.table_overhead + B * K)


def shift_norm_cost(T: int, window: int, p: int, d: int, k: int, by: Constants = DEFAULT) -> int:
    """A convolution's Gram from shifted Grams of single pixels: T² p + window² d / k + k T²."""
    added = int(k * T * T * by.shift_elementwise)
    return T * T * p + window * window * (d // k) + added


def fused_shift_norm_cost(T: int, pixels: int, p: int, d: int, k: int) -> int:
    """The same by the compiled kernel, without the lower halves: T² p / 2 + pixels² d / 2k."""
    return (T * (T + FUSED_TILE) * p + pixels * (pixels + FUSED_TILE) * (d // k)) // 2
