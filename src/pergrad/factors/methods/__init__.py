"""Ways to take norms that several kinds share, over plain tensors.

Owns: Grams of positions, by torch's ops and by the compiled kernel.
Does not know: factors.
"""
