"""The measured numbers in the cost model: those of a typical CPU, or of the machine at hand.

Owns: `Constants`, and the folder that keeps what `pergrad.calibrate` has measured.
Does not know: how they are weighed (`costs`), how they are measured (`calibration`).

They decide which of several exact methods is used, never what is computed.
"""

import json
import platform
import re
import warnings
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch

from pergrad import folders
from pergrad.errors import users_line

FOLDER = "PERGRAD_COSTS"  # the environment variable that says where they are kept; empty: nowhere
FORMAT = 2


@dataclass(frozen=True, slots=True)
class Constants:
    """Times in multiply-adds of a large matrix product. The defaults were measured on one core.

    Milliseconds with two threads, Gram by torch / by the kernel / direct, (B, T, d, p):
      (8, 128, 768, 768): 1.5, 0.9, 4.6     (64, 16, 512, 512): 0.4, 0.25, 4.1
      (16, 128, 256, 256): 1.2, 0.6, 1.1    (64, 49, 128, 128): 0.8, 0.4, 0.6
      (64, 64, 128, 128): 0.8, 0.4, 0.8     (8, 197, 192, 768): 2.3, 1.3, 1.8
      (4, 512, 512, 512): 5.4, 3.9, 3.7     (16, 256, 256, 1024): 8.3, 5.2, 9.3
      (16, 256, 256, 256): 3.5, 2.0, 2.2    (1, 1024, 768, 768): 7.4, 5.8, 4.0
      (64, 32, 64, 64): 0.2, 0.1, 0.16      (2, 512, 768, 768): 4.2, 3.0, 4.1
    One thread:
    Rows of a table, all pairs, by joining them / as tables, (B, T, rows, width):
      (16, 128, 1000, 256): 3.3, 8.5   (64, 64, 300, 64): 14, 3.0   (64, 32, 30000, 128): 1.6, 2.5
    Row by row: (32, 128, 512, 512): 21, 16; (32, 8, 768, 768): 0.4, 4.4.
    A convolution of 64 examples, patches / torch's convolution / shifts, (channels, size, kernel):
      (64, 32 x 32, 3): 62, 37, -      (128, 16 x 16, 3): 39, 36, 46    (256, 8 x 8, 3): 18, 67, 8
      (512, 4 x 4, 3): 12, 270, 3      (3 to 64, 32 x 32, 3): 4.2, 4.9, -
      (64 in 4 groups, 32 x 32, 3): 50, 14, -     (64 depthwise, 32 x 32, 3): 27, 15, -
      (64 to 128, 16 x 16 by steps of 2, 3): 27, 22, -     (1 to 6, 28 x 28, 5): 0.8, 1.6, -
    Of 16 examples with two threads, torch's convolution / shifts by torch / by the kernel:
      (128, 16 x 16, 3): 5.6, 6.6, 1.6    (256, 8 x 8, 3): 9.7, 1.5, 0.3
      (512, 4 x 4, 3): 14, 0.9, 0.1       (64 to 128, 16 x 16 by steps of 2, 3): 1.3, 2.8, 0.5
    """

    direct_elementwise: float = 50  # a number of a gradient that is formed is written and squared
    sum_reading: float = 40  # a number of a sum over positions, as a bias asks for
    gram_overhead: float = 1.5  # a Gram's multiply-adds: its products are smaller
    gram_elementwise: float = 32  # an entry of it is written, read and multiplied once more
    fused_overhead: float = 1.05  # the same by the compiled kernel
    fused_reading: float = 20  # a number that it lays out for its tiles
    dot_overhead: float = 1.6  # the same row by row, whose guard copies the rows that it doubts
    pair_overhead: float = 34_000  # a pair of scattered rows that are multiplied
    gather_overhead: float = 196  # reading one number of them
    table_overhead: float = 185  # one number of the tables that are multiplied instead
    patch_overhead: float = 45  # laying out one number of a patch, or of the gradient beside it
    call_overhead: float = 1_000_000  # an example's share of a call of torch's convolution
    call_elementwise: float = 50  # one number of the gradient that it returns
    call_reads: float = 30  # one number that it reads
    shift_calls: float = 2_000_000
    shift_elementwise: float = 16  # adding up one shifted Gram reads strided rows
    shift_overhead: float = 1.7
    fused_shift_elementwise: float = 16  # the same within the compiled kernel


DEFAULT = Constants()
_NAMES = {field.name for field in fields(Constants)}


_measured: dict[str, Constants] = {}  # in this process


def constants(device: torch.device, dtype: torch.dtype) -> Constants:
    """What holds for products on a device in a dtype: measured there, or the default.

    Looked up in the file once per process and number of threads.
    """
    return _constants_for(device, dtype, torch.get_num_threads())


@lru_cache(maxsize=64)
def _constants_for(device: torch.device, dtype: torch.dtype, threads: int) -> Constants:
    kind = _kind(device, dtype, threads)
    return _measured.get(kind) or _read(kind)


def keep(device: torch.device, dtype: torch.dtype, found: Constants) -> Path | None:
    """Use these from now on, and in later processes on such a machine; the file they are in.

    None if there is no folder for it, or it cannot be written: then in this process only.
    """
    kind = _kind(device, dtype, torch.get_num_threads())
    _measured[kind] = found
    _constants_for.cache_clear()
    path = _file(kind)
    if path is None:
        return None
    text = json.dumps({"format": FORMAT, "measured on": kind, "constants": asdict(found)}, indent=1)
    try:
        folders.write(path, text.encode())
    except OSError as error:
        warnings.warn(
            f"The measured costs cannot be kept in {path} ({error}): they hold in this process "
            f"only. Set the environment variable {FOLDER} to a folder that can be written.",
            stacklevel=users_line(),
        )
        return None
    return path


def forget() -> None:
    """What was measured in this process, and what the files said."""
    _measured.clear()
    _constants_for.cache_clear()


def folder() -> Path | None:
    """Where measured constants are kept; None if the environment says nowhere."""
    return folders.folder(FOLDER, "costs")


def _file(kind: str) -> Path | None:
    """A file for each kind of machine: those that share a home folder do not meet."""
    home = folder()
    return None if home is None else home / f"{re.sub('[^A-Za-z0-9.]+', '-', kind)}.json"


def _read(kind: str) -> Constants:
    path = _file(kind)
    try:
        if path is None or not path.exists():
            return DEFAULT
        text = json.loads(path.read_text())
        if text["format"] != FORMAT or text["measured on"] != kind:
            return DEFAULT  # of another version of pergrad: measured again when asked
        return _constants(text["constants"])
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        warnings.warn(
            f"The measured costs in {path} cannot be read ({error}), so typical ones are used: "
            "pergrad may be slower. Delete the file, or call pergrad.calibrate().",
            stacklevel=users_line(),
        )
        return DEFAULT


def _constants(values: dict[str, float]) -> Constants:
    if set(values) != _NAMES or not all(0 < float(v) < float("inf") for v in values.values()):
        raise ValueError("not the numbers of a cost model")
    return Constants(**{name: float(v) for name, v in values.items()})


def _kind(device: torch.device, dtype: torch.dtype, threads: int) -> str:
    release = ".".join(torch.__version__.split(".")[:2])
    return f"{machine(device, threads)}, torch {release}, {str(dtype).removeprefix('torch.')}"


def machine(device: torch.device, threads: int) -> str:
    """A device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_processor()}, {threads} threads"


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
