"""Which of several exact methods to use: counts of multiply-adds, and nothing else.

Owns: the choice of a method for products of `Outer` and `Rows`, and the measured constants in it.
Does not know: tensors. Dimensions: B and K examples, T and S positions, p outputs, d inputs.

The rule in the literature, 2 T² <= d p, compares what is *stored*; here nothing is, so the
arithmetic decides.
"""

# A Gram's symmetric half is computed in rows of blocks, each a matrix product of its own. Two
# blocks pay from 128 positions on, more of them from 128 positions each.
GRAM_BLOCK = 128
GRAM_BLOCKS = 8

# Multiply-adds of a Gram take this much longer than those of the direct form: its products are
# smaller, and every entry is written, read and multiplied once more (counted as 32 multiply-adds).
# Measured, milliseconds on one core, Gram against direct, (B, T, d, p):
#   (8, 128, 768, 768): 2.5, 8.4    (8, 512, 768, 768): 27, 29     (64, 16, 512, 512): 0.6, 7.6
#   (16, 128, 256, 256): 1.9, 2.3   (64, 49, 128, 128): 1.1, 1.0   (1, 1024, 768, 768): 13, 7.9
#   (64, 64, 128, 128): 1.4, 1.3    (2, 512, 768, 3072): 18, 30    (8, 197, 192, 768): 3.9, 3.7
GRAM_OVERHEAD = 1.2
GRAM_ELEMENTWISE = 32

# The same for products row by row, whose guard also copies the rows that it doubts. Measured,
# (B, T, d, p) = (32, 128, 512, 512): 21 against 16; (32, 8, 768, 768): 0.4 against 4.4.
DOT_OVERHEAD = 1.6

# Reading scattered rows is this much slower, per number, than a multiply-add of a matrix product.
GATHER_OVERHEAD = 8


def gram_blocks(T: int) -> int:
    """Rows of blocks in which the symmetric Gram of T positions is computed."""
    return max(2 if T >= GRAM_BLOCK else 1, min(GRAM_BLOCKS, T // GRAM_BLOCK))


def row_norm_cost(p: int, d: int) -> int:
    """|g|² |a|², one position: p + d."""
    return p + d


def gram_norm_cost(T: int, p: int, d: int, readers: int = 1) -> int:
    """Σ_ts (g_t·g_s)(a_t·a_s), half by symmetry (less, in k blocks): T² (p + d) (k + 1) / 2k.

    The Gram of a that several uses read costs each of them its share.
    """
    k = gram_blocks(T)
    return T * T * (p + d // readers) * (k + 1) // (2 * k)


def direct_norm_cost(T: int, p: int, d: int) -> int:
    """Form Gᵀ A, then square it: T p d (+ p d)."""
    return (T + 1) * p * d


def outer_norm_method(T: int, p: int, d: int, readers: int = 1) -> str:
    """How to take the norms of an Outer: "rows", "gram" or "direct"."""
    if T <= 1:
        return "rows"
    gram = GRAM_OVERHEAD * (gram_norm_cost(T, p, d, readers) + GRAM_ELEMENTWISE * T * T)
    return "gram" if gram < direct_norm_cost(T, p, d) else "direct"


def outer_norm_cost(T: int, p: int, d: int, readers: int = 1) -> int:
    """Multiply-adds per example and group of the chosen method."""
    method = outer_norm_method(T, p, d, readers)
    if method == "rows":
        return row_norm_cost(p, d)
    return gram_norm_cost(T, p, d, readers) if method == "gram" else direct_norm_cost(T, p, d)


def outer_dot_method(T: int, S: int, p: int, d: int) -> str:
    """Row b with row b of two Outers.

    "gram": T S (p + d), and its guard the norms of both, at most (T² + S²) (p + d).
    "direct": form one and pass the other through it, T p d + S p d.
    """
    if T <= 1 and S <= 1:
        return "rows"
    gram = DOT_OVERHEAD * (T * S + T * T + S * S) * (p + d + GRAM_ELEMENTWISE)
    return "gram" if gram < (T + S) * p * d else "direct"


def outer_gram_method(B: int, K: int, T: int, S: int, p: int, d: int, *, same: bool = False) -> str:
    """All pairs of two Outers.

    "rows": T = S = 1. "gram": B K T S (p + d), half if `same`. "tiles": form both sides a tile at
    a time, (B T + K S) p d (once if `same`), then multiply, B K p d.
    """
    if T <= 1 and S <= 1:
        return "rows"
    gram = GRAM_OVERHEAD * B * K * T * S * (p + d + GRAM_ELEMENTWISE) / (2 if same else 1)
    tiles = (B * T + (0 if same else K * S) + B * K) * p * d
    return "gram" if gram < tiles else "tiles"


def join_is_cheaper(pairs: int, B: int, K: int, ids: int) -> bool:
    """Two Rows, all pairs: join equal ids (`pairs` row products), or B K products over all ids."""
    return pairs * GATHER_OVERHEAD < B * K * ids


# A convolution's methods, in multiply-adds of a matrix product. Measured on one core, milliseconds
# for 64 examples, explicit patches / torch's convolution / shifts, (channels, size, kernel):
#   (64, 32 x 32, 3): 62, 37, -      (128, 16 x 16, 3): 39, 36, 46    (256, 8 x 8, 3): 18, 67, 8
#   (512, 4 x 4, 3): 12, 270, 3      (3 to 64, 32 x 32, 3): 4.2, 4.9, -
#   (64 in 4 groups, 32 x 32, 3): 50, 14, -     (64 depthwise, 32 x 32, 3): 27, 15, -
#   (64 to 128, 16 x 16 by steps of 2, 3): 27, 22, -     (1 to 6, 28 x 28, 5): 0.8, 1.6, -
PATCH_OVERHEAD = 45  # laying out one number of a patch, or of the gradient beside it
CALL_OVERHEAD = 1_000_000  # an example's share of a call of torch's convolution
CALL_ELEMENTWISE = 50  # one number of the gradient that it returns
CALL_READS = 30  # one number that it reads
SHIFT_CALLS = 2_000_000
SHIFT_ELEMENTWISE = 16  # adding up one shifted Gram reads strided rows
SHIFT_OVERHEAD = 1.7


def shift_norm_cost(T: int, window: int, p: int, d: int, k: int) -> int:
    """A convolution's Gram from shifted Grams of single pixels: T² p + window² d / k + k T²."""
    return T * T * p + window * window * (d // k) + k * T * T * SHIFT_ELEMENTWISE


def correlation_norm_method(
    N: int, T: int, window: int, p: int, d: int, k: int, *, call: int | None = None
) -> str:
    """Norms of a convolution's weight: as an `Outer` over patches, "shift" or "convolution".

    "convolution" is torch's own gradient for each example; `call` is how many numbers it reads,
    None if it cannot be called. All counts but that one are of one of N groups.
    """
    plain = outer_norm_method(T, p, d)
    if plain == "rows":
        return plain
    patches = T * (p + d) * PATCH_OVERHEAD
    costs: dict[str, float] = {
        plain: outer_norm_cost(T, p, d) * (GRAM_OVERHEAD if plain == "gram" else 1) + patches
    }
    if k > 1:
        costs["shift"] = SHIFT_OVERHEAD * shift_norm_cost(T, window, p, d, k) + SHIFT_CALLS
    if call is not None:
        moved = (CALL_READS * call + CALL_OVERHEAD) / N
        costs["convolution"] = T * p * d + CALL_ELEMENTWISE * p * d + moved
    return min(costs, key=lambda name: costs[name])
