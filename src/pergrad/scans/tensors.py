"""Tensors of any layout, seen as the plain tensors that they are made of.

Owns: parts, bytes, hashes, equality and finiteness of tensors that are sparse, nested, of a few
bits, or without memory.
Does not know: whose tensors they are.
"""

from collections.abc import Iterable
from hashlib import blake2b

import torch
from torch import Tensor


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """Plain tensors that say all that a tensor says; none for one without memory (meta)."""
    tensor = tensor.detach()
    if tensor.device.type == "meta":
        return []
    if tensor.is_nested:
        if tensor.layout == torch.jagged:
            return [tensor.values(), tensor.offsets()]  # type: ignore[attr-defined]
        return list(tensor.unbind())
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.layout != torch.strided:  # oneDNN's, and whatever else there is
        return [tensor.to_dense()]
    return [tensor]


def bits(tensor: Tensor) -> Tensor:
    """A plain tensor's bytes, (n,), in the memory that it is in."""
    tensor = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return tensor.view(torch.uint8)


def hash_of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """128 bits over names, dtypes, shapes and numbers."""
    digest = blake2b(digest_size=16)
    for name, tensor in named:
        for values in plain_parts(tensor):
            digest.update(
                f"{name} {values.dtype} {tuple(values.shape)}".encode("utf-8", "backslashreplace")
            )
            digest.update(bits(values.cpu()).numpy().data)
    return digest.hexdigest()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one kind hold the same."""
    pairs = list(zip(plain_parts(a), plain_parts(b), strict=True))
    return all(x.shape == y.shape and _equal(x, y) for x, y in pairs)


def _equal(x: Tensor, y: Tensor) -> bool:
    try:
        return torch.equal(x, y)
    except (RuntimeError, NotImplementedError):  # of four bits, say
        return torch.equal(bits(x), bits(y))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether there is no NaN or infinity in any of them."""
    for tensor in tensors:
        for part in plain_parts(tensor):
            try:
                finite = part.isfinite()
            except (RuntimeError, NotImplementedError):
                try:
                    finite = part.float().isfinite()  # of eight bits
                except (RuntimeError, NotImplementedError):
                    continue  # has no infinity
            if not bool(finite.all()):
                return False
    return True
