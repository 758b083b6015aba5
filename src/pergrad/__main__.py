"""`python -m pergrad` is the command `pergrad`.

Owns: nothing.
Does not know: the commands.
"""

import sys

from pergrad.command import main

if __name__ == "__main__":
    sys.exit(main())
