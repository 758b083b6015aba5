"""What `pergrad explain` runs: one small batch of a job.

Owns: which examples are taken, and the mode and device that they are scored in.
Does not know: the options of the command line, or how the answer is printed.
"""

import pergrad
from pergrad.command import jobs
from pergrad.scans import manifest, model_state, scorer


def coverage(name: str, examples: int) -> pergrad.Coverage:
    """How the first examples' losses reach the parameters, in the mode that they are scored in."""
    job = jobs.job(name)
    with model_state.prepared(job.model, "eval"):
        params = manifest.parameters_of(job)
        with jobs.told("Computing the losses of the first examples"):
            batch = scorer.fetch(job.collate, job.data, range(min(examples, len(job))), seed=0)
            home = scorer.home_of(params)
            losses = job.losses(job.model, scorer.to_device(batch, home) if home else batch)
        return pergrad.explain(losses, params)
