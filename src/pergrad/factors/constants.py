"""The measured numbers in the cost model: those of a typical CPU, or of the machine at hand.

Owns: `Constants`, and the file that keeps what `pergrad.calibrate` has measured.
Does not know: how they are weighed (`costs`), how they are measured (`calibration`).

They decide which of several exact methods is used, never what is computed.
"""

import json
import os
import platform
import warnings
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch

FILE = "PERGRAD_COSTS"  # the environment variable that says where the file is; empty: there is none
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Constants:
    """Times in multiply-adds of a large matrix product. The defaults were measured on one core.

    Milliseconds, Gram against direct, (B, T, d, p):
      (8, 128, 768, 768): 2.5, 8.4    (8, 512, 768, 768): 27, 29     (64, 16, 512, 512): 0.6, 7.6
      (16, 128, 256, 256): 1.9, 2.3   (64, 49, 128, 128): 1.1, 1.0   (1, 1024, 768, 768): 13, 7.9
      (64, 64, 128, 128): 1.4, 1.3    (2, 512, 768, 3072): 18, 30    (8, 197, 192, 768): 3.9, 3.7
    Rows of a table, all pairs, by joining them / as tables, (B, T, rows, width):
      (16, 128, 1000, 256): 3.3, 8.5   (64, 64, 300, 64): 14, 3.0   (64, 32, 30000, 128): 1.6, 2.5
    Row by row: (32, 128, 512, 512): 21, 16; (32, 8, 768, 768): 0.4, 4.4.
    A convolution of 64 examples, patches / torch's convolution / shifts, (channels, size, kernel):
      (64, 32 x 32, 3): 62, 37, -      (128, 16 x 16, 3): 39, 36, 46    (256, 8 x 8, 3): 18, 67, 8
      (512, 4 x 4, 3): 12, 270, 3      (3 to 64, 32 x 32, 3): 4.2, 4.9, -
      (64 in 4 groups, 32 x 32, 3): 50, 14, -     (64 depthwise, 32 x 32, 3): 27, 15, -
      (64 to 128, 16 x 16 by steps of 2, 3): 27, 22, -     (1 to 6, 28 x 28, 5): 0.8, 1.6, -
    """

    gram_overhead: float = 1.2  # a Gram's multiply-adds: its products are smaller
    gram_elementwise: float = 32  # an entry of it is written, read and multiplied once more
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


DEFAULT = Constants()
_NAMES = {field.name for field in fields(Constants)}


_measured: dict[str, Constants] = {}  # in this process


@lru_cache(maxsize=64)
def constants(device: torch.device, dtype: torch.dtype) -> Constants:
    """What holds for products on a device in a dtype: measured there, or the default.

    Looked up in the file once per process.
    """
    key = _key(device, dtype)
    return _measured.get(key) or _read().get(key, DEFAULT)


def keep(device: torch.device, dtype: torch.dtype, found: Constants) -> Path | None:
    """Use these from now on, and in later processes on such a machine; the file they are in.

    None if there is no file, or it cannot be written: then in this process only.
    """
    key, path = _key(device, dtype), file()
    _measured[key] = found
    constants.cache_clear()
    if path is None:
        return None
    everything = {name: asdict(old) for name, old in _read().items()} | {key: asdict(found)}
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(json.dumps({"format": FORMAT, "constants": everything}, indent=1))
        whole.replace(path)  # never half a file, whoever reads it now
    except OSError as error:
        warnings.warn(
            f"The measured costs cannot be kept in {path} ({error}): they hold in this process "
            f"only. Set the environment variable {FILE} to a file that can be written.",
            stacklevel=3,
        )
        return None
    return path


def forget() -> None:
    """What was measured in this process, and what the file said."""
    _measured.clear()
    constants.cache_clear()


def file() -> Path | None:
    """Where measured constants are kept; None if the environment says nowhere."""
    chosen = os.environ.get(FILE)
    if chosen is not None:
        return Path(chosen) if chosen else None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "pergrad" / "costs.json"


def _read() -> dict[str, Constants]:
    path = file()
    try:
        if path is None or not path.exists():
            return {}
        text = json.loads(path.read_text())
        if text["format"] != FORMAT:
            return {}  # of another version of pergrad: measured again when asked
        return {key: _constants(values) for key, values in text["constants"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"The measured costs in {path} cannot be read ({error}), so typical ones are used: "
            "pergrad may be slower. Delete the file, or call pergrad.calibrate().",
            stacklevel=2,
        )
        return {}


def _constants(values: dict[str, float]) -> Constants:
    if set(values) != _NAMES or not all(0 < float(v) < float("inf") for v in values.values()):
        raise ValueError("not the numbers of a cost model")
    return Constants(**{name: float(v) for name, v in values.items()})


def _key(device: torch.device, dtype: torch.dtype) -> str:
    """The kind of machine: a home folder may be shared by several."""
    release = ".".join(torch.__version__.split(".")[:2])
    return f"{machine(device)}, torch {release}, {str(dtype).removeprefix('torch.')}"


def machine(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_processor()}, {torch.get_num_threads()} threads"


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
