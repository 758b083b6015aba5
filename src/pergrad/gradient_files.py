"""Gradients on the disk, as factors, in one safetensors file that needs no unpickling.

Owns: how each kind of factor is written down and read again, and what is wrong with a file.
Does not know: the algebra of matrices.

What is written is what is held: for a linear layer its inputs and the gradients at its outputs. A
factor that only a function can compute is formed first.
"""

import json
import os
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pergrad import folders
from pergrad.errors import StoreError, UsageError
from pergrad.extras import need
from pergrad.factors import (
    Correlation,
    Dense,
    Embedded,
    Factor,
    Isometry,
    Mapped,
    Outer,
    Placed,
    Rows,
    Sum,
    Zero,
)

FORMAT, VERSION = "pergrad gradients", 1
_OF_CORRELATION = ("kernel", "stride", "padding", "dilation", "groups", "shape")


def write(path: str | PathLike[str], factors: Mapping[str, Factor], batch: int) -> None:
    """Write factors by parameter's name, whole or not at all."""
    need("safetensors", "safetensors")
    from safetensors.torch import save

    place = Path(path)
    if os.path.lexists(place) and (place.is_symlink() or not place.is_file()):
        raise UsageError(f"{place} is not an ordinary file. Pass the path of a file, or of none.")
    about, tensors = packed(factors, batch)
    try:
        content = save(tensors, metadata={FORMAT: about})
        folders.write(place, content, mode=0o666, durable=True, make=False)
    except OSError as error:
        raise UsageError(
            f"Cannot write {place}: {error.strerror or error}. Pass the path of a file in a folder "
            "that exists and can be written to."
        ) from error


def packed(factors: Mapping[str, Factor], batch: int) -> tuple[str, dict[str, Tensor]]:
    """Factors as a text, and as the tensors that it names."""
    tensors: dict[str, Tensor] = {}
    places: dict[Any, str] = {}

    def keep(tensor: Tensor) -> str:
        tensor = tensor.detach()
        # One tensor may be in several factors: what a weight and its bias share, say.
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in places or not tensor.numel():
            places[key] = str(len(tensors))
            # clone: safetensors refuses two tensors in one memory
            tensors[places[key]] = tensor.cpu().contiguous().clone()
        return places[key]

    about: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "examples": batch,
        "factors": [[name, _written(factor, keep)] for name, factor in factors.items()],
    }
    return json.dumps(about), tensors


def unpacked(text: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Factor], int]:
    """What was packed. Raises anything where it was not."""
    about = json.loads(text)
    found = {str(name): _read(form, tensors) for name, form in about["factors"]}
    if not found or any(f.batch != about["examples"] for f in found.values()):
        raise ValueError("its factors are of different examples")
    return found, about["examples"]


def _written(factor: Factor, keep: Callable[[Tensor], str]) -> dict[str, Any]:
    """A factor as what JSON holds, and tensors that are kept by name."""
    if isinstance(factor, Zero):
        return {"kind": "Zero", "batch": factor.batch, "shape": factor.shape,
                "dtype": str(factor.dtype).removeprefix("torch.")}  # fmt: skip
    if isinstance(factor, Outer):
        return {"kind": "Outer", "g": keep(factor.g), "a": keep(factor.a), "shape": factor.shape}
    if isinstance(factor, Rows):
        return {"kind": "Rows", "ids": keep(factor.ids), "g": keep(factor.g),
                "shape": factor.shape, "sparse": factor.sparse}  # fmt: skip
    if isinstance(factor, Correlation):
        more = {name: getattr(factor, name) for name in _OF_CORRELATION}
        return {"kind": "Correlation", "g": keep(factor.g), "x": keep(factor.x), **more}
    if isinstance(factor, Sum):
        return {"kind": "Sum", "parts": [_written(f, keep) for f in factor.factors]}
    if isinstance(factor, Placed):
        return {"kind": "Placed", "part": _written(factor.factor, keep),
                "index": keep(factor.index), "batch": factor.batch}  # fmt: skip
    if isinstance(factor, Mapped):
        return {"kind": "Mapped", "part": _written(factor.factor, keep),
                "source": factor.isometry.source, "steps": factor.isometry.steps}  # fmt: skip
    if isinstance(factor, Embedded):
        return {"kind": "Embedded", "part": _written(factor.factor, keep),
                "shape": factor.shape, "index": factor.index}  # fmt: skip
    return {"kind": "Dense", "values": keep(factor.dense())}


def read(path: str | PathLike[str]) -> tuple[dict[str, Factor], int]:
    """Factors by parameter's name, and how many examples they are of.

    Raises:
        StoreError: the file cannot be read, or is not one that `write` wrote.
    """
    need("safetensors", "safetensors")
    from safetensors import SafetensorError, safe_open

    place = Path(path)
    try:
        if not place.is_file():
            raise FileNotFoundError(f"there is no file {place}")
        with safe_open(place, framework="pt") as file:
            said = (file.metadata() or {}).get(FORMAT)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"Cannot read gradients from {place}: {error}. Check the path, or bring the file back "
            "from a copy; J.save(path) writes one."
        ) from None
    try:
        about = json.loads(said or "{}")
        if about.get("format") != FORMAT:
            raise StoreError(
                f"{place} is a safetensors file of something else. Pass one that J.save(path) has "
                "written."
            )
        if about["version"] != VERSION:
            raise StoreError(
                f"{place} has gradients in format version {about['version']!r}; this pergrad reads "
                f"version {VERSION}. Read it with the pergrad that wrote it."
            )
        return unpacked(said or "", tensors)
    except StoreError:
        raise
    except Exception as error:  # whatever a foreign hand has written there
        raise StoreError(
            f"{place} is not what J.save wrote ({type(error).__name__}: {error}). Bring the file "
            "back from a copy, or save the gradients again."
        ) from None


def _read(form: dict[str, Any], tensors: Mapping[str, Tensor]) -> Factor:
    """A factor from what `_written` gave. Raises whatever its class does of wrong sizes."""
    kind = form["kind"]
    shape = tuple(form.get("shape") or ())
    if kind == "Zero":
        dtype = getattr(torch, form["dtype"])
        if form["dtype"] not in ("float32", "float64"):
            raise ValueError(f"zeros of dtype {dtype}")
        return Zero(form["batch"], shape, "cpu", dtype)
    if kind == "Dense":
        return Dense(tensors[form["values"]])
    if kind == "Outer":
        return Outer(tensors[form["g"]], tensors[form["a"]], shape)
    if kind == "Rows":
        ids = tensors[form["ids"]]
        if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < shape[0]:
            raise ValueError("rows that the table does not have")
        return Rows(ids, tensors[form["g"]], shape, sparse=form["sparse"])
    if kind == "Correlation":
        more = {name: form[name] for name in _OF_CORRELATION}
        return Correlation(tensors[form["g"]], tensors[form["x"]], **more)
    if kind == "Sum":
        return Sum([_read(part, tensors) for part in form["parts"]])
    if kind not in ("Placed", "Mapped", "Embedded"):
        raise ValueError(f"a factor of the kind {kind!r}")
    part = _read(form["part"], tensors)
    if kind == "Placed":
        return Placed(part, tensors[form["index"]], form["batch"])
    if kind == "Mapped":
        steps = tuple((step, tuple(how)) for step, how in form["steps"])
        return Mapped(part, Isometry(tuple(form["source"]), steps))
    return Embedded(part, shape, tuple(form["index"]))
