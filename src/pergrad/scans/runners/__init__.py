"""Where a scan runs: in this process, on workers of Ray, on the ranks of torchrun.

Owns: one file for each.
Does not know: how a batch's numbers come about.
"""
