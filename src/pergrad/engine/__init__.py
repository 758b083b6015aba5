"""One backward pass from the losses to a factor for every parameter.

Owns: planning a pass, hooking it in, serving uses, leaving the user's tensors as they were.
Does not know: what a caller makes of the factors.
"""
