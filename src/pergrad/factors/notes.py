"""What matrices that were pickled up to 0.1 hold beside their factors; it is dropped as they load.

Owns: two names that pickle looks up.
Does not know: anything else.
"""


class Notes:
    """What the norms of a weight left for those of its bias."""


class KeptGram:
    """A Gram that several factors read."""
