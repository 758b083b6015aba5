"""What a folder of scores says about itself, and whether that is what is to be scored now.

Owns: the description of what is scored, and what differs between two of them.
Does not know: files.
"""

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from pergrad import api, inputs
from pergrad.errors import UsageError
from pergrad.scans.form import columns_of
from pergrad.scans.job import Job
from pergrad.scans.tensors import hash_of_tensors
from pergrad.scans.text import message_of, storable
from pergrad.scans.work import Work
from pergrad.version import __version__

NAMED = {
    "against": "reference",
    "checkpoints": "checkpoint",
}  # settings by name -> the word for one


def hash_of_strings(strings: Iterable[str]) -> str:
    """128 bits over strings and where they end."""
    digest = blake2b(digest_size=16)
    for string in strings:
        encoded = string.encode("utf-8", "backslashreplace")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def parameters_of(job: Job) -> dict[str, Tensor]:
    """The parameters that gradients are taken for, by name."""
    return inputs.named(job.model if job.params is None else job.params)


def key_of(job: Job, i: int) -> str:
    """The stable name of example i."""
    assert job.key is not None
    try:
        return storable(str(job.key(i)))
    except Exception as error:
        raise UsageError(
            f"`job.key({i})` raised {message_of(error)}. Every example needs a name, "
            "also one that cannot be loaded: make `key` a function of the number alone."
        ) from error


def weights_of(model: nn.Module, params: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Everything a loss may depend on: parameters and buffers, and what else gradients are for."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, p in params.items():
        yield f"params {name}", p


def hash_of_parameters(job: Job) -> str:
    """Of what nothing may write to while it is scored; buffers may count, and an embedding with
    `max_norm` shortens its rows as they are used.
    """
    shortened = {
        id(module.weight) for module in job.model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    }  # fmt: skip
    own = {n: p for n, p in job.model.named_parameters() if id(p) not in shortened}
    there = shortened | {id(p) for p in own.values()}
    more = {f"params {n}": p for n, p in parameters_of(job).items() if id(p) not in there}
    return hash_of_tensors({**own, **more}.items())


def scored(job: Job) -> dict[str, Any]:
    """What is scored, so that it is recognised: the model, its weights, the data set."""
    params = parameters_of(job)
    keys = None
    if job.key is not None:
        keys = hash_of_strings(key_of(job, i) for i in range(len(job)))
    return {
        "model": type(job.model).__qualname__,
        "losses": str(getattr(job.losses, "__qualname__", type(job.losses).__qualname__)),
        "parameters": [[n, list(p.shape), str(p.dtype)] for n, p in params.items()],
        "weights_hash": hash_of_tensors(weights_of(job.model, params)),
        "examples": len(job),
        "keys_hash": keys,
        "torch": torch.__version__,
        "pergrad": __version__,
    }


def columns(work: Work) -> dict[str, Any]:
    """The table's columns in order: type (Arrow's name), unit, meaning."""
    return columns_of(
        double=api.result_dtype(parameters_of(work.job)) == torch.float64,
        keys=work.job.key is not None,
        groups=work.settings.groups,
        references=[name for reference in work.references for name in reference.columns],
        checkpoints=[point.name for point in work.checkpoints],
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two manifests that makes their scores incomparable, in words."""
    found = []
    was, now = old["scored"], new["scored"]
    if was["model"] != now["model"]:
        found.append(f"the model's class was {was['model']} and is {now['model']}")
    if was["parameters"] != now["parameters"]:
        found.append(_parameters(was["parameters"], now["parameters"]))
    elif was["weights_hash"] != now["weights_hash"]:
        found.append("the model's weights or buffers have other values")
    if was["examples"] != now["examples"]:
        found.append(f"the data set had {was['examples']:,} examples and has {now['examples']:,}")
    elif was.get("keys_hash") != now["keys_hash"]:
        found.append("the keys of the examples have changed")
    before, after = old["settings"], new["settings"]
    for kind, word in NAMED.items():
        had, has = before.get(kind, {}), after.get(kind, {})
        for name in {**had, **has}:
            if name not in has:
                found.append(f"the {word} {name!r} is not given any more")
            elif name not in had:
                found.append(f"the {word} {name!r} is new")
            elif had[name] != has[name]:
                found.append(f"the {word} {name!r} has other values")
    for name in sorted({*before, *after} - {"batch_size", "automatic", "device", *NAMED}):
        if before.get(name) != after.get(name):
            found.append(f"{name} was {before.get(name)!r} and is {after.get(name)!r}")
    mixing = before.get("options", {}).get("on_mixing") == "exact"
    if mixing and before["batch_size"] != after["batch_size"]:
        found.append(
            f"batch_size was {before['batch_size']} and is {after['batch_size']}, and with "
            'on_mixing="exact" scores depend on it'
        )
    if list(old["columns"]) != list(new["columns"]) and not found:  # keys are given, or no longer
        found.append(f"the columns were {list(old['columns'])} and are {list(new['columns'])}")
    return found


def _parameters(was: list[Any], now: list[Any]) -> str:
    """The first parameters that differ."""
    before, after = ({n: (s, d) for n, s, d in each} for each in (was, now))
    gone = [n for n in before if n not in after]
    new = [n for n in after if n not in before]
    changed = [n for n in before if n in after and before[n] != after[n]]
    parts = []
    if gone:
        parts.append(f"no longer there: {inputs.names_list(gone)}")
    if new:
        parts.append(f"new: {inputs.names_list(new)}")
    if changed:
        parts.append(
            "other shape or dtype: "
            + ", ".join(f"`{n}` {before[n]} and {after[n]}" for n in changed[:5])
        )
    return f"the parameters differ ({'; '.join(parts) or 'their order'})"
