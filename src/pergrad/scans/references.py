"""What each example's gradient is compared with, made ready.

Owns: turning what `against` was given into references, and the stored ones.
Does not know: how products are taken, how a mean is computed.
"""

import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pergrad import gradient_files, inputs
from pergrad.errors import StoreError, UsageError
from pergrad.matrix import GradientMatrix
from pergrad.scans import manifest
from pergrad.scans.job import Gradients, Job, MeanGradient
from pergrad.scans.mistakes import check_reference
from pergrad.scans.reference_data import mean_gradient, single_gradients
from pergrad.scans.store import Store
from pergrad.scans.tensors import hash_of_tensors
from pergrad.scans.text import printable
from pergrad.scans.work import Reference, Settings


def references_for(
    job: Job, against: Mapping[str, Any], store: Store, settings: Settings
) -> tuple[Reference, ...]:
    """What each example's gradient is compared with."""
    params = manifest.parameters_of(job)
    shapes = {n: tuple(p.shape) for n, p in params.items()}
    devices = {n: p.device for n, p in params.items()}
    found = []
    for name, value in against.items():
        if isinstance(value, Gradients):
            value = _gradients(job, store, settings, name, value)
        if isinstance(value, GradientMatrix):
            _check_shapes(name, value, shapes)
            norms = tuple(value.norms().double().tolist())
            rows = (item for k in range(len(value)) for item in value[k].dense().items())
            found.append(Reference(name, value, norms, hash_of_tensors(rows)))
        else:
            if isinstance(value, MeanGradient):
                value = _mean(job, store, settings, name, value)
            check_reference(name, value)
            v = inputs.direction(value, shapes, devices, f"against[{name!r}]")
            v = {n: part.detach() for n, part in v.items()}
            norm = float(torch.stack([p.double().cpu().norm() for p in v.values()]).norm())
            found.append(Reference(name, v, (norm,), hash_of_tensors(v.items())))
        if not all(map(math.isfinite, found[-1].norms)):
            raise UsageError(
                f"The reference against[{name!r}] has numbers that are not finite, so no inner "
                "product with it would be. Find the example or the parameter it comes from."
            )
    return tuple(found)


def _check_shapes(name: str, J: GradientMatrix, shapes: Mapping[str, tuple[int, ...]]) -> None:
    differ = [n for n in {**shapes, **J.shapes} if J.shapes.get(n) != shapes.get(n)]
    if differ:
        raise UsageError(
            f"The reference against[{name!r}] is not about the parameters that are scored: "
            f"{inputs.names_list(differ)} differ or are only on one side. Pass the same selection "
            "of parameters to pergrad.gradients and as the job's `params`."
        )


def _mean(
    job: Job, store: Store, settings: Settings, name: str, value: MeanGradient
) -> dict[str, Tensor]:
    """The mean gradient: the stored one if it is the same but for rounding, so that a scan that is
    resumed on another machine compares with the very same numbers.
    """
    mean = mean_gradient(job, value.data, settings)
    safe = manifest.hash_of_strings([name])
    content = _content(store, safe)
    kept = content if content and all(isinstance(t, Tensor) for t in content.values()) else None
    if kept is not None and _close(kept, mean):
        return {n: kept[n].to(m.device) for n, m in mean.items()}
    if kept is None or not _compared_with(store, name):
        _keep(store, safe, {n: t.cpu() for n, t in mean.items()})
    return mean


def _gradients(
    job: Job, store: Store, settings: Settings, name: str, value: Gradients
) -> GradientMatrix:
    """The gradients of single examples: likewise the stored ones if they are the same."""
    J = single_gradients(job, value.data, settings)
    safe = manifest.hash_of_strings([name])
    kept = _matrix(store, safe)
    if kept is not None and _alike(kept, J):
        return kept.to(J.device)
    if kept is None or not _compared_with(store, name):
        about, tensors = gradient_files.packed(J._factors, len(J))
        _keep(store, safe, {"about": about, "tensors": tensors})
        return (_matrix(store, safe) or J).to(J.device)  # as whoever goes on will have it
    return J


def _compared_with(store: Store, name: str) -> bool:
    """Whether there are scores with a reference of that name; else it was of a stopped scan."""
    settings = store.manifest["settings"] if store.manifest and store.parts() else {}
    return name in settings.get("against", {})


def _matrix(store: Store, name: str) -> GradientMatrix | None:
    """A stored matrix; None if there is none of that name."""
    content = _content(store, name)
    if content is None or not isinstance(content.get("about"), str):
        return None
    try:
        return GradientMatrix(*gradient_files.unpacked(content["about"], content["tensors"]))
    except Exception as error:  # whatever wrong sizes raise
        raise _foreign(store, error) from None


def _alike(kept: GradientMatrix, J: GradientMatrix) -> bool:
    """Whether two matrices differ by rounding at most."""
    if (kept.shapes, kept.dtype, len(kept)) != (J.shapes, J.dtype, len(J)):
        return False
    a, b = (each.cpu().to(torch.float64) for each in (kept, J))
    apart = a.norms() ** 2 + b.norms() ** 2 - 2 * a.row_dots(b)
    return bool((apart <= 1e-6 * b.norms() ** 2).all())


def _close(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two directions differ by rounding at most."""
    if [(n, t.shape, t.dtype) for n, t in a.items()] != [
        (n, t.shape, t.dtype) for n, t in b.items()
    ]:
        return False
    pairs = [(a[n].double().cpu(), b[n].double().cpu()) for n in a]
    apart = sum(float((x - y).square().sum()) for x, y in pairs)
    return apart <= 1e-6 * sum(float(y.square().sum()) for _, y in pairs)


def _keep(store: Store, name: str, content: Mapping[str, Any]) -> None:
    sink = io.BytesIO()
    torch.save(dict(content), sink)
    store.add_file("references", name, sink.getvalue(), ".pt")


def _content(store: Store, name: str) -> dict[str, Any] | None:
    """What was stored of a reference, texts and tensors; None if there is none of that name."""
    content = store.file("references", name, ".pt")
    if content is None:
        return None
    try:
        found = torch.load(io.BytesIO(content), weights_only=True)
        return {str(n): value for n, value in found.items()}
    except Exception as error:  # whatever torch raises for a file that is not one of its own
        raise _foreign(store, error) from None


def _foreign(store: Store, error: Exception) -> StoreError:
    return StoreError(
        f"A reference in {printable(store.folder / 'references')} is not what pergrad wrote "
        f'({printable(error)[:200]}). Run the scan again with rescore="damaged".'
    )
