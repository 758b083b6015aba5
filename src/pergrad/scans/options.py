"""The options of a scan, once: for Python, for the command line, and for who carries it out.

Owns: each option's name, type, default and one-line help, and what is refused of it alone.
Does not know: the job, torch, how the command line spells an option, how a scan uses it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from pergrad.errors import UsageError

if TYPE_CHECKING:
    from pergrad.inputs import Direction
    from pergrad.matrix import GradientMatrix
    from pergrad.scans.checkpoints import Source
    from pergrad.scans.job import Gradients, MeanGradient

Mode = Literal["eval", "train", "as is", "as-is"]  # the last two are the same
Engine = Literal["local", "ray", "torchrun"]
Grouping = Literal["layer", "parameter"]
Rescore = Literal["damaged", "failed"]
Mixing = Literal["raise", "exact"]

OF_THE_VERBS = ("on_mixing", "check_layout", "chunk_bytes")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """What `pergrad.scan` takes besides a job and a folder; its docstring says more of each.

    Raises:
        UsageError: a value that no scan can have.
    """

    batch_size: int | Literal["auto"] = field(
        default="auto", metadata=_help("Examples in a batch. auto halves it when memory runs out.")
    )
    against: "Mapping[str, GradientMatrix | Direction | MeanGradient | Gradients] | None" = field(
        default=None,
        metadata=_help(
            "Also the inner product and cosine with a reference: what the function returns when it "
            "is called with the Job, in the mode of the scan. A pergrad.MeanGradient, a "
            "pergrad.Gradients, a GradientMatrix or a direction; without NAME=, a dict from names "
            "to such. May be repeated."
        ),
    )
    groups: Grouping | Mapping[str, Sequence[str]] | None = field(
        default=None, metadata=_help("Also the norm of each layer's or parameter's gradient.")
    )
    checkpoints: "Sequence[Source] | Mapping[str, Source] | None" = field(
        default=None,
        metadata=_help(
            "Also loss and norm with other weights of the model, a state dict of torch.save or "
            "safetensors, and their means over all of these. May be repeated."
        ),
    )
    mode: Mode = field(
        default="eval",
        metadata=_help("The mode to score the model in; it is put back afterwards."),
    )
    device: str | None = field(
        default=None, metadata=_help("Move model and batches there: cuda, cuda:1, cpu.")
    )
    on_mixing: Mixing = field(
        default="raise",
        metadata=_help("exact: pay for examples that influence each other, as in batch norm."),
    )
    check_layout: Literal["once", "always", "never"] = field(
        default="once", metadata=_help("When to measure which rows belong to which example.")
    )
    chunk_bytes: int | None = field(
        default=None, metadata=_help("The most memory for temporary results, in bytes.")
    )
    engine: Engine = field(
        default="local",
        metadata=_help(
            "ray: in several processes, or on a cluster. torchrun: each rank its share of "
            "the examples, after `torchrun --nproc-per-node N -m pergrad scan`."
        ),
    )
    workers: int | None = field(
        default=None,
        metadata=_help("ray: how many processes score. Otherwise: how many fetch examples ahead."),
    )
    address: str | None = field(
        default=None, metadata=_help("ray: a cluster's address. By default this machine.")
    )
    seed: int = field(
        default=0, metadata=_help("Of random numbers drawn while examples are fetched and scored.")
    )
    rescore: Rescore | None = field(
        default=None, metadata=_help("Score again what is in damaged files, or what failed before.")
    )
    resume: bool = field(default=True, metadata=_help("Refuse a DIR that has scores already."))
    recheck: bool = field(
        default=True, metadata=_help("When resuming, do not compare one finished batch first.")
    )
    progress: bool = field(default=True, metadata=_help("No progress bar."))
    source: str | None = field(
        default=None, metadata=_help("Where the job was loaded from, for the manifest.")
    )
    command: str | None = field(
        default=None, metadata=_help("How this was called, for the manifest.")
    )

    def __post_init__(self) -> None:
        if self.mode not in ("eval", "train", "as is", "as-is"):
            raise UsageError(f'mode is {self.mode!r}; pass "eval", "train" or "as is".')
        if self.mode == "as-is":
            object.__setattr__(self, "mode", "as is")
        if self.rescore not in (None, "damaged", "failed"):
            raise UsageError(f'rescore is {self.rescore!r}; pass "damaged", "failed" or None.')
        size = self.batch_size
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise UsageError(f'batch_size is {size!r}; pass a positive number, or "auto".')
        if self.workers is not None and (not isinstance(self.workers, int) or self.workers < 0):
            raise UsageError(f"workers is {self.workers!r}; pass a number of processes.")
        if self.engine not in ("local", "ray", "torchrun"):
            raise UsageError(
                f'There is no engine {self.engine!r}. Pass "local", "ray" or "torchrun".'
            )
        if self.address is not None and self.engine != "ray":
            raise UsageError('address is for engine="ray"; the others run in this process.')

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "ScanOptions":
        """The options that a caller named.

        Raises:
            UsageError: there is no option of that name, or a value is wrong.
        """
        names = [option.name for option in fields(cls)]
        unknown = [name for name in given if name not in names]
        if unknown:
            own = ", ".join(name for name in names if name not in OF_THE_VERBS)
            raise UsageError(
                f"scan has no option {', '.join(unknown)}. Its options are {own}; and, as in "
                f"pergrad.norms, {', '.join(OF_THE_VERBS)}."
            )
        return cls(**given)

    @property
    def of_the_verbs(self) -> dict[str, Any]:
        """Those that go to `pergrad.norms` and its like, where they differ from the default."""
        return {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.name in OF_THE_VERBS and getattr(self, option.name) != option.default
        }
