"""Every differentiable op and module that torch keeps sample inputs for, against the loop."""
