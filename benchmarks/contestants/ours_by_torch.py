"""pergrad as it is on a machine without a C compiler: torch's ops alone."""

import os

# Read when a kernel is first needed, which is after this.
os.environ["PERGRAD_KERNELS"] = ""

from contestants.ours import clip, norms

__all__ = ["clip", "norms"]
