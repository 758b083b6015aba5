"""Whether a job still gives the numbers that are stored.

Owns: which finished batches are scored again, and by how much their numbers may differ.
Does not know: what a manifest can tell; it is asked after that.
"""

from dataclasses import replace

import numpy as np
import torch

from pergrad.errors import StoreError
from pergrad.scans import manifest
from pergrad.scans.scorer import Scorer
from pergrad.scans.store import Store, Survey
from pergrad.scans.work import Work


def recheck(store: Store, work: Work, survey: Survey) -> None:
    """Score the first and the last finished batch again: what the hashes do not see (the loss
    function, the examples themselves) shows in the numbers.
    """
    good = np.flatnonzero(survey.present & ~survey.failed)
    if not len(good):
        return
    size, total = work.settings.batch_size, len(survey.present)
    scorer = Scorer(replace(work, checkpoints=()))  # these are known by their hashes
    stored = {name: np.full(total, np.nan) for name in ("loss", "norm")}
    firsts = sorted({int(good[0]) // size * size, int(good[-1]) // size * size})
    blocks = [range(lo, min(lo + size, total)) for lo in firsts]
    for _, table in store.tables(["index", "loss", "norm"]):
        if table is not None:
            index = table["index"].to_numpy()
            near = np.isin(index // size * size, firsts)
            for name, values in stored.items():
                values[index[near]] = table[name].to_numpy()[near]
    precision = [torch.finfo(p.dtype).eps for p in manifest.parameters_of(work.job).values()]
    tolerance = max(1e-3, 32 * max(precision))  # another machine's rounding, and far below a change
    for block in blocks:
        table = scorer.score(block)
        for name, values in stored.items():
            was = values[block.start : block.stop]
            now = table[name].to_numpy()
            known = np.isfinite(was)
            scale = np.fmax(abs(was), abs(now)) + 1e-2 * np.max(abs(was[known]), initial=0)
            wrong = np.flatnonzero(known & ~(abs(was - now) <= tolerance * scale))
            if len(wrong):
                at = wrong[0]
                raise StoreError(
                    f"The scores in {store.folder} are of something else, so this scan cannot go "
                    f"on with them: the {name} of example {block[at]} was {was[at]:.6g} and is now "
                    f"{now[at]:.6g} ({len(wrong)} of {len(block)} examples differ). Model and "
                    "settings are the same, so the loss function, the collate function or the data "
                    "must have changed, or draw random numbers of their own. Nothing was changed. "
                    "Scan into another folder, bring back what was, or pass recheck=False if the "
                    "difference is meant."
                )
