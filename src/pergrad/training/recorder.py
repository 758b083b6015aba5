"""From micro-batches to rows of a run: one step at a time, on the disk now and then.

Owns: `Recorder`: when a step is over, what is logged of it, when rows are written, what is kept for
a person to see, and failures, each said once.
Does not know: models, backward passes; the form of the folder.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from math import isfinite, nan
from typing import Any

import torch

from pergrad.errors import PergradError, StoreError, UsageError
from pergrad.graph import nodes
from pergrad.scans.report.preview import Preview
from pergrad.scans.text import message_of, printable, storable
from pergrad.training.noise_of_ranks import sums_of_ranks
from pergrad.training.noise_scale import NoiseScale
from pergrad.training.other_run import difference
from pergrad.training.run_folder import (
    FORMAT,
    VERSION,
    RunFolder,
)
from pergrad.training.run_notes import leave
from pergrad.training.step_numbers import (
    Baseline,
    Piece,
    joined,
    scores_of,
    step_numbers,
    to_blame,
)
from pergrad.training.waiting import Waiting
from pergrad.version import __version__

SECONDS_PER_PART = 10.0
SHARE_PER_PART = 0.01  # of the time so far: a long run has hundreds of files, not thousands
ROWS_PER_PART = 100_000  # at most, by and large: 10 MB
MOST_ROWS = 1_000_000  # that wait for a disk that takes none
_AHEAD = 3  # examples of a step that may be shown though they are no outliers
_NO_NUMBER = 3e38  # the ratio of what is not a number: it stands out more than any

Log = Callable[[dict[str, float], int], Any]
_logger = logging.getLogger("pergrad.watch")


class Recorder:
    """Collects a run's rows."""

    def __init__(self, folder: RunFolder, clip: float | None, keep: int, log: Log | None) -> None:
        self.folder, self.clip, self.keep = folder, clip, keep
        self.logs = [] if log is None else [log]
        self.noise = NoiseScale()
        self.spikes: list[str] = []
        self.failures: list[str] = []
        self.off: str | None = None  # why nothing is recorded any more
        self.rank, self.ranks = 0, 1
        self.last = -1  # the last step of this folder
        self._started = self._warned = False
        self._done: set[int] = set()
        self._begun = False  # whether the run's first step is known
        self._compare = False  # whether the next step that is stored shows if it is the same run
        self._baseline = Baseline()
        self._reference = nan
        self._settings: dict[str, Any] = {}
        self._step: int | None = None
        self._pieces: list[Piece] = []
        self._grad_norm, self._sharded = nan, False
        self._failure: str | None = None
        self._examples = Waiting()
        self._refused = 0  # rows that the disk did not take
        self._steps: list[dict[str, Any]] = []
        self._tally: dict[str, list[float]] = {}  # key -> how often an outlier, largest ratio
        self._shown: dict[str, Preview] = {}
        self._shown_changed = False
        self._began = self._flushed = time.monotonic()
        self._wrote = False
        self._flushed_once = False  # the first step goes to the disk at once, to see if it can

    # --- steps -----------------------------------------------------------------------------------

    def start(self, rank: int, ranks: int) -> None:
        """What the folder has of this rank; before its first step. Raises StoreError."""
        if self._started:
            return
        self._started, self.rank, self.ranks = True, rank, ranks
        try:
            self._done = self.folder.steps_of(rank)
            for key, stored in self.folder.shown().items():
                self._shown[key] = Preview.from_stored(*stored)
        except StoreError as error:
            self._stop(str(error))
            raise
        self.last = max(self._done, default=-1)

    def begins_with(self, step: int) -> None:
        """A step of the run, by its number; the first one is asked for."""
        if not self._begun:
            self._begun = True
            self._compare = bool(self._done) and step <= min(self._done)

    def goes_on(self) -> int:
        """The number of the first step, where they are not given."""
        self._begun = True
        if self._done:
            self._note(
                f"{printable(self.folder.folder)} has {len(self._done)} watched steps already, so "
                f"these are counted on from {self.last + 1}, as those of one run. Another run "
                f"needs a folder of its own, such as {printable(self.folder.free())}; "
                "Watch(..., resume=False) makes sure of it."
            )
        return self.last + 1

    @property
    def under_way(self) -> int | None:
        """The step at hand."""
        return self._step

    def wants(self, step: int) -> bool:
        """Whether a step is to be read: it is not stored already, or tells another run."""
        if self.off is not None:
            return False
        if step == self._step or step not in self._done:
            return True
        if not self._compare and not self._warned:
            self._warned = True
            _logger.warning("%s", printable(self._already(step)))
        return self._compare

    def _already(self, step: int) -> str:
        return (
            f"{printable(self.folder.folder)} has step {step} of this run already, so that is not "
            "read again, nor are other steps that are there. Another run of the same model needs "
            "a folder of its own."
        )

    def _compare_with_stored(self, step: int, whole: Piece) -> None:
        """A run that begins at the first step again; if it is another, it is left out."""
        self._compare, self._warned = False, True
        rows = self.folder.examples_of(self.rank, step)
        differs = difference(rows, whole) if rows["key"] else None
        if differs is None:  # so far: it may learn at another rate
            return self._note(self._already(step))
        return self._stop(
            f"{printable(self.folder.folder)} has another run: in step {step}, {differs}. Nothing "
            "was changed, and nothing of this run is kept; give it a folder of its own, such as "
            f"{printable(self.folder.free())}, or delete the old one before."
        )

    def describe(self, model: str, parameters: list[list[Any]], settings: dict[str, Any]) -> None:
        """What is trained; a folder of another run is refused. Raises StoreError."""
        self._settings = {"model": model, "parameters": parameters, **settings}
        there = self.folder.manifest
        if there is None:
            return
        self._reference = float(there.get("tokens", nan))
        differ = [n for n in ("model", "parameters") if there[n] != self._settings[n]]
        if differ:
            was, now = there[differ[0]], self._settings[differ[0]]
            if differ[0] == "parameters":
                was, now = _first_difference(was, now)
            self._stop(
                f"{printable(self.folder.folder)} has another run: its {differ[0]} was "
                f"{printable(was)} and is {printable(now)}. Nothing was changed; give this run a "
                "folder of its own."
            )
            raise StoreError(self.off)

    def begins(self, step: int) -> bool:
        """A micro-batch of a step begins; whether it is the step's first."""
        if step == self._step:
            return False
        self.finish_step()
        self._step = step
        self._grad_norm, self._sharded = nan, False
        return True

    def add(self, piece: Piece, grad_norm: float, sharded: bool) -> None:
        """A micro-batch of the step; grad_norm is that of the gradients so far."""
        self._pieces.append(piece)
        self._grad_norm, self._sharded = grad_norm, sharded

    def fail(self, error: BaseException, what: str = "") -> None:
        """Say what failed, once; the step at hand has no numbers."""
        words = what + (str(error) if isinstance(error, PergradError) else message_of(error))
        if self._step is not None:
            self._failure = storable(words)
        self.say(words)

    def say(self, words: str) -> None:
        """Log something, once."""
        if words not in self.failures:
            self.failures.append(words)
            _logger.warning("%s", printable(words))

    def _note(self, words: str) -> None:
        """Say something that whoever looks into the folder later has to know, too."""
        self.say(words)
        if self.folder.manifest is not None:
            with suppress(OSError):  # it has been said
                leave(self.folder.folder, self.rank, storable(words))

    def _stop(self, words: str) -> None:
        """Nothing is recorded any more."""
        self.off = words
        self._note(words)

    def finish_step(self) -> None:
        """The step is over: its rows, what is logged, and now and then the disk."""
        step, self._step = self._step, None
        pieces, self._pieces = self._pieces, []
        failure, self._failure = self._failure, None
        if step is None:
            return
        if step in self._done:
            if pieces and self._compare:
                self._compare_with_stored(step, joined(pieces))
            return
        self._done.add(step)
        self.last = max(self.last, step)
        row: dict[str, Any] = {"step": step, "rank": self.rank, "ranks": self.ranks}
        row |= {"sharded": self._sharded, "examples": 0, "note": failure}
        if failure is None and pieces:
            self._numbers(row, joined(pieces))
        self._steps.append(row)
        now = time.monotonic()
        wait = max(SECONDS_PER_PART, SHARE_PER_PART * (now - self._began))
        many = len(self._examples) - self._refused >= ROWS_PER_PART
        if not self._flushed_once or many or now - self._flushed > wait:
            self.flush()

    def _numbers(self, row: dict[str, Any], whole: Piece) -> None:
        step, count = row["step"], len(whole.norm)
        if self._reference != self._reference:
            mean = float(whole.tokens.mean()) if count else nan
            self._reference = mean if mean > 0 else nan
        reference = self._reference if self._reference > 0 else 1.0
        scores = scores_of(whole, reference)
        ratios, outliers = self._baseline.ratios(scores)
        row["examples"] = count
        row |= step_numbers(whole, scores, self._grad_norm, self.clip)
        keys: list[str | None] = [None] * count
        if whole.keys is not None:
            keys = list(whole.keys)
        spike = self._baseline.spike(row["loss"], row["grad_norm"], count)
        if spike is not None:
            row["spike"] = f"{spike}: {_named(to_blame(whole), keys)}"
            self.spikes.append(f"step {step}: {row['spike']}")
            _logger.warning("%s", printable(self.spikes[-1]))
        self._add_noise(row)
        columns = {
            "loss": whole.loss, "tokens": whole.tokens.round().long(), "weight": whole.weight,
            "norm": whole.norm, "score": scores, "ratio": ratios, "outlier": outliers,
        }  # fmt: skip
        if count:
            self._examples.add(step, keys, columns)
        self._remember(whole, ratios, outliers)
        self._log(row, int(outliers.sum()))

    def _add_noise(self, row: dict[str, Any]) -> None:
        q, grad_norm, concentration = sums_of_ranks([row])
        if all(isfinite(v) for v in (q, grad_norm, concentration)) and row["examples"] > 1:
            try:
                self.noise.add_sums(q, grad_norm, concentration)
            except UsageError:
                return  # one example has all the weight
            band = self.noise.low, self.noise.high
            row |= {"noise_scale": self.noise.value, "noise_low": band[0], "noise_high": band[1]}

    def _remember(self, whole: Piece, ratios: torch.Tensor, outliers: torch.Tensor) -> None:
        """What a person sees of the examples that the page shows: by times, then by ratio."""
        keys = whole.keys
        if keys is None:  # nothing is told apart
            return
        largest = ratios.nan_to_num(nan=_NO_NUMBER, posinf=_NO_NUMBER)
        largest[ratios.isnan() & ~outliers] = 0  # there is no median yet
        chosen = set(torch.nonzero(outliers).flatten().tolist())
        chosen.update(largest.topk(min(_AHEAD, len(largest))).indices.tolist())
        chosen.update(i for i, key in enumerate(keys) if key in self._tally)
        for i in sorted(chosen):
            key = keys[i]
            times, most = self._tally.get(key, (0, 0.0))
            now = [times + bool(outliers[i]), max(most, float(largest[i]))]
            shown = key in self._shown
            if not shown and whole.preview is not None and self.keep:
                shown = len(self._shown) < self.keep or self._make_room(now)
                if shown:
                    self._shown[key] = self._preview_of(whole.preview, i)
                    self._shown_changed = True
            if shown or now[0]:  # of the others there is no end
                self._tally[key] = now

    def _make_room(self, standing: list[float]) -> bool:
        """Whether one of those that are shown stood out less, which then is not shown any more."""
        least = min(self._shown, key=lambda key: self._tally.get(key, [0, 0.0]))
        if self._tally.get(least, [0, 0.0]) >= standing:
            return False
        del self._shown[least]
        if least in self._tally and not self._tally[least][0]:
            del self._tally[least]
        return True

    def _preview_of(self, show: Callable[[int], Any], row: int) -> Preview:
        try:
            return Preview.of(show(row))
        except Exception as error:  # whatever the user's function raises
            return Preview(error=message_of(error, 500))

    def _log(self, row: dict[str, Any], outliers: int) -> None:
        if not self.logs:
            return
        numbers: dict[str, Any] = {
            **{f"norm/{q}": row[q] for q in ("p1", "p10", "p50", "p90", "p99", "max")},
            **{n: row[n] for n in ("zero", "clipped", "top_share", "cosine")},
            "noise_scale": row.get("noise_scale"),
            "noise_scale/low": row.get("noise_low"),
            "noise_scale/high": row.get("noise_high"),
            "outliers": float(outliers),
            **{f"norm/{n[5:]}": v for n, v in row.items() if n.startswith("norm:")},
        }
        finite = {f"pergrad/{n}": float(v) for n, v in numbers.items()
                  if v is not None and isfinite(v)}  # fmt: skip
        for log in self.logs:
            try:
                log(dict(finite), row["step"])
            except Exception as error:
                self.say(f"`log` raised {message_of(error)}")

    # --- the disk --------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write what waits. What the disk refuses is said once, and tried again later."""
        self._flushed = time.monotonic()
        if self.off is not None or not self._settings or not (self._steps or self._shown_changed):
            return
        self._flushed_once = True
        try:
            self.folder.take(self.rank)
            if self.folder.manifest is None:
                about = {"format": FORMAT, "version": VERSION, "pergrad": __version__,
                         "torch": torch.__version__, "created": datetime.now(UTC).isoformat(),
                         "tokens": self._reference if self._reference > 0 else 1.0,
                         "clip": self.clip, **self._settings}  # fmt: skip
                self.folder.save(about)
            if self._examples:
                self.folder.add_examples(self.rank, self._examples)
                self._examples.clear()
            if self._steps:
                self.folder.add_steps(self.rank, self._steps)
                self._steps = []
            if self._shown_changed:
                rows = [dict(zip(("key", "kind", "label", "data"), (k, *p.stored()), strict=True))
                        for k, p in self._shown.items()]  # fmt: skip
                self.folder.add_shown(self.rank, rows)
                self._shown_changed = False
            self._wrote = True
        except OSError as error:
            self.say(
                f"Cannot write to {printable(self.folder.folder)}: {error.strerror or error}. "
                "Training goes on, and what was read waits in memory. Make room, or a folder that "
                "can be written to."
            )
        except StoreError as error:
            self._stop(str(error))
        self._refused = len(self._examples)
        if self._refused > MOST_ROWS:
            self._stop(f"{MOST_ROWS:,} rows wait for the disk, so no more are read.")

    def check_written(self) -> None:
        """What is in the folder is of this run. Raises StoreError."""
        if self.off is not None and not self._wrote:
            raise StoreError(self.off)

    @nodes.never_compiled  # a collection may call it
    def close(self) -> None:
        """Write everything and let others write."""
        try:
            self.finish_step()
            self.flush()
        except Exception as error:  # at exit, or in a user's step
            self.say(message_of(error))
        self.folder.leave()


def _named(blamed: list[tuple[int, float]], keys: list[str | None]) -> str:
    """Examples and their shares, in words."""
    words = []
    for i, share in blamed:
        name = f"row {i}" if keys[i] is None else str(keys[i])
        words.append(f"{name} ({100 * share:.0f} %)" if share == share else f"{name} (no number)")
    return "most of it from " + ", ".join(words)


def _first_difference(was: list[Any], now: list[Any]) -> tuple[Any, Any]:
    for a, b in zip(was, now, strict=False):
        if a != b:
            return a, b
    return f"{len(was)} tensors", f"{len(now)} tensors"
