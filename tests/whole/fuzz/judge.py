"""pergrad's answers on one random model against one call of autograd per example."""

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tests.whole.fuzz.models import Model
from torch import Tensor

import pergrad
from pergrad.graph import plan

TOLERANCE = 1e-9


@dataclass
class Verdict:
    """`kind`: "exact", "mixed" (refused, exact on request), "unsupported",
    "torch" (torch is wrong, by finite differences), "nothing", "refused" (without need), or a failure."""  # noqa: E501

    kind: str
    detail: str = ""
    fallbacks: int = 0
    interacting: bool = False

    @property
    def failed(self) -> bool:
        return self.kind in ("wrong", "crash")


class Wrong(Exception):
    """A number that is not the loop's."""


def truth(losses: Tensor, params: dict[str, Tensor], **how: bool) -> Tensor:
    """(B, P) by the naive loop."""
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True,
                                    allow_unused=True, **how)  # fmt: skip
        rows.append(torch.cat([
            torch.zeros_like(p).reshape(-1) if g is None else g.to_dense().reshape(-1)
            for p, g in zip(params.values(), grads, strict=True)
        ]))  # fmt: skip
    return torch.stack(rows)


def compare(what: str, got: Tensor, expected: Tensor, scale: Tensor) -> None:
    if got.shape != expected.shape:
        raise Wrong(f"{what}: shape {tuple(got.shape)} for {tuple(expected.shape)}")
    error = (got - expected).abs() / scale.clamp_min(1e-30)
    error = torch.where((got == expected) | ((got - expected).abs() < 1e-11), 0.0, error)
    if not bool((error <= TOLERANCE).all()):
        raise Wrong(f"{what}: off by {float(error.max()):.2e}\n  got {got.tolist()}\n"
                    f"  not {expected.tolist()}")  # fmt: skip


def _dense(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if g is None else g.to_dense() for g in grads]


VERBS = ("gram", "by_parameter", "dots", "backward", "matrix", "create_graph")


def check(losses: Tensor, params: dict[str, Tensor], verbs: tuple[str, ...],
          J: Tensor | None = None, **options: object) -> None:  # fmt: skip
    """Raise Wrong, or whatever pergrad raises."""
    J = truth(losses, params) if J is None else J
    if not bool(torch.isfinite(J).all()):
        raise ArithmeticError
    norms = J.norm(dim=1)
    keep = {"retain_graph": True, **options}
    compare("norms", pergrad.norms(losses, params, **keep), norms, norms)
    if "flat" in verbs:
        matrix = pergrad.gradients(losses, params, **keep)
        compare("flat", matrix.flat(), J, norms[:, None])
    if "matrix" in verbs:
        matrix = pergrad.gradients(losses, params, **keep)
        products, scale = J @ J.T, norms[:, None] * norms
        compare("J.gram()", matrix.gram(), products, scale)
        compare("J[::-1]", matrix[::2].flat(), J[::2], norms[::2, None])
        compare("J.norms()", matrix.norms(), norms, norms)
        compare("dots", pergrad.dots(losses, params, against=matrix, **keep), products, scale)
    if "gram" in verbs:
        compare("gram", pergrad.gram(losses, params, **keep), J @ J.T, norms[:, None] * norms)
    sizes = [p.numel() for p in params.values()]
    if "by_parameter" in verbs:
        parts = pergrad.norms_by_parameter(losses, params, **keep)
        for (name, part), piece in zip(parts.items(), J.split(sizes, 1), strict=True):
            compare(f"norms of {name}", part, piece.norm(dim=1), norms)
    if "dots" in verbs:
        v = torch.linspace(-1, 1, J.shape[1], dtype=J.dtype).cos()
        compare("dots", pergrad.dots(losses, params, against=v, **keep), J @ v, norms * v.norm())
    if "backward" in verbs and all(p.is_leaf for p in params.values()):
        weights = torch.linspace(-1, 2, len(losses), dtype=J.dtype)
        try:
            found = pergrad.backward(losses, params, weights=weights, **keep)
            compare("backward's norms", found, norms, norms)
            grads = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).reshape(-1)  # noqa: E501
                               for p in params.values()])  # fmt: skip
            compare("grad", grads, J.T @ weights, (norms * weights.abs()).sum().expand(grads.shape))
        finally:
            for p in params.values():
                p.grad = None
    if "create_graph" in verbs and bool((norms > 1e-3).all()):
        try:
            live = truth(losses, params, create_graph=True)
            wanted = _dense(torch.autograd.grad(live.norm(dim=1).sum(), list(params.values()),
                                                retain_graph=True, allow_unused=True))  # fmt: skip
        except RuntimeError:
            return
        if any(g is not None and not bool(torch.isfinite(g).all()) for g in wanted):
            return
        got = pergrad.norms(losses, params, create_graph=True, **options)
        compare("norms with create_graph", got.detach(), norms, norms)
        second = _dense(torch.autograd.grad(got.sum(), list(params.values()), allow_unused=True,
                                            retain_graph=True)) \
            if got.requires_grad else [None] * len(params)  # fmt: skip
        for name, one, two in zip(params, second, wanted, strict=True):
            one = torch.zeros(1) if one is None else one
            two = torch.zeros(1) if two is None else two
            scale = sum(float(g.norm()) for g in wanted if g is not None) + 1e-3
            if float((one - two).abs().max()) > 1e-7 * scale:
                raise Wrong(f"second derivative for {name}: {one.tolist()}, not {two.tolist()}")


def freed(model: Model, version: int, J: Tensor, rng: random.Random, options: dict) -> None:
    """Without retain_graph, on a new graph; what was returned must outlive it."""
    norms = J.norm(dim=1)
    losses = model.forward(model.data(version))
    verb = rng.choice(["norms", "gradients", "backward"])
    if verb == "norms" or not all(p.is_leaf for p in model.params.values()):
        compare("norms, graph freed", pergrad.norms(losses, model.params, **options), norms, norms)
    elif verb == "gradients":
        matrix = pergrad.gradients(losses, model.params, **options)
        del losses
        compare("flat, graph freed", matrix.flat(), J, norms[:, None])
        compare("gram, graph freed", matrix.gram(), J @ J.T, norms[:, None] * norms)
    else:
        try:
            found = pergrad.backward(losses, model.params, weights=pergrad.clip(0.5), **options)
            compare("backward's norms, graph freed", found, norms, norms)
            weights = pergrad.clip(0.5)(norms)
            grads = torch.cat([
                (torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).reshape(-1)
                for p in model.params.values()
            ])  # fmt: skip
            compare(
                "clipped grad", grads, J.T @ weights, (norms * weights).sum().expand(grads.shape)
            )
        finally:
            for p in model.params.values():
                p.grad = None


def finite_differences(model: Model, version: int) -> Tensor:
    """(B, P), to settle what torch and pergrad disagree about."""
    data = model.data(version)
    leaves = [p for p in model.params.values() if p.is_leaf]
    return central(leaves, lambda: model.forward(data).detach())


def central(leaves: Sequence[Tensor], value: Callable[[], Tensor], step: float = 1e-6) -> Tensor:
    """(*shape of the value, P): its differences when each number of the leaves is moved."""
    columns = []
    for p in leaves:
        flat = p.detach().view(-1)
        for i in range(flat.numel()):
            here = float(flat[i])
            flat[i] = here + step
            up = value()
            flat[i] = here - step
            columns.append((up - value()) / (2 * step))
            flat[i] = here
    return torch.stack(columns, -1)


def loop_is_wrong(model: Model, version: int) -> bool:
    """Whether torch's own gradients are not the finite differences; of computed tensors, too."""
    with model.without_hooks():
        data = model.data(version)
        model.forward(data)
        middle = {name: p for name, p in model.params.items() if not p.is_leaf}
        model.nudges = {name: torch.zeros_like(p) for name, p in middle.items()}
        try:
            losses = model.forward(data)
            J = truth(losses, model.params)
            leaves = [model.nudges.get(name, p) for name, p in model.params.items()]
            real = central(leaves, lambda: model.forward(data).detach())
        finally:
            model.nudges = {}
        return bool((J - real).abs().max() > 1e-3 * real.abs().max())


def repeats_itself(model: Model, version: int) -> bool:
    """Whether torch's own gradients are the same in every graph of the same numbers."""
    with model.without_hooks():
        found = [truth(model.forward(model.data(version)), model.params) for _ in range(20)]
        return all(torch.equal(J, found[0]) for J in found)


def second_is_wrong(model: Model, version: int, **options: object) -> bool:
    """Whether pergrad's derivatives of norms are the finite differences, the loop's not."""
    with model.without_hooks():
        data = model.data(version)
        leaves = [p for p in model.params.values() if p.is_leaf]

        def loop(create_graph: bool = False) -> Tensor:
            rows = truth(model.forward(data), model.params, create_graph=create_graph)
            return rows.norm(dim=1).sum()

        losses = model.forward(data)
        mine = pergrad.norms(losses, model.params, create_graph=True, **options).sum()
        found = {}
        for name, total in (("loop", loop(create_graph=True)), ("mine", mine)):
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
            found[name] = torch.cat([
                torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1)
                for p, g in zip(leaves, grads, strict=True)
            ])  # fmt: skip
        real = central(leaves, lambda: loop().detach())
    off = {name: (grads - real).abs().max() for name, grads in found.items()}
    return bool(off["mine"] < 1e-3 * off["loop"])


def torch_is_wrong(model: Model, version: int, **options: object) -> bool:
    """Whether pergrad's gradients are the finite differences and the loop's are not."""
    with model.without_hooks():
        losses = model.forward(model.data(version))
        if not all(p.is_leaf for p in model.params.values()):
            return False
        J = truth(losses, model.params)
        mine = pergrad.gradients(losses, model.params, retain_graph=True, **options).flat()
        real = finite_differences(model, version)
    apart = (mine - J).abs() > 1e-10 * J.abs().max()
    off, theirs = (mine - real).abs()[apart], (J - real).abs()[apart]
    return bool(apart.any()) and bool(off.max() < 0.01 * theirs.max())


def interacts(model: Model, data: dict[str, Tensor]) -> bool:
    """Whether another example's data changes some example's loss."""
    found = False
    plain = model.forward(data).detach()
    for i in range(model.batch):
        moved = (model.forward(model.changed(data, i)).detach() - plain).abs() > 1e-12
        found |= int(moved.sum()) > 1
    return found or model.mixing or "losses twice" in model.log


def judge(seed: int, skip: frozenset[int] = frozenset(), everything: bool = False) -> Verdict:
    """One model under one seed."""
    plan.clear()
    model = Model(seed, skip)
    rng = random.Random(seed + 5)
    fallbacks = 0
    refused = ""
    for version in (0, 1):  # the second time a remembered plan is used
        data = model.data(version)
        losses = model.forward(data)
        params = model.params
        if not params or not losses.requires_grad:
            return Verdict("nothing")
        try:
            truth(losses, params)
        except (RuntimeError, NotImplementedError) as error:
            return Verdict("torch", f"no backward pass: {error}"[:150])
        verbs = ("flat", *rng.sample(VERBS, 2)) if version == 0 else (rng.choice(("flat", *VERBS)),)
        verbs = ("flat", *VERBS) if everything else verbs
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if {"freq", "sparse"} & set(
                model.log
            ):  # torch's own second derivative is wrong or missing
                verbs = tuple(verb for verb in verbs if verb != "create_graph")
            options: dict[str, object] = {}
            if rng.random() < 0.2:
                options["check_layout"] = "always"
            if rng.random() < 0.2:
                options["chunk_bytes"] = rng.choice([1, 100, 1000])
            try:
                try:
                    check(losses, params, verbs, **options)
                except pergrad.MixedExamplesError as error:
                    refused = str(error).split(":")[0]
                    check(losses, params, verbs, **options, on_mixing="exact")
                if version or everything:  # as most callers do: the graph is freed
                    J = truth(losses, params)
                    last = {**options, "on_mixing": "exact"}
                    freed(model, version, J, rng, last)
            except pergrad.UsageError as error:
                reached = bool(truth(losses, params).any())
                if "reach none of the parameters" in str(error) and not reached:
                    return Verdict("nothing", "no parameter is reached")
                return Verdict("crash", f"{type(error).__name__}: {error}")
            except pergrad.UnsupportedError as error:
                if "defect of pergrad" in str(error):
                    if loop_is_wrong(model, version):
                        return Verdict("torch", "torch mixes examples that its formula does not")
                    return Verdict("crash", f"defect: {error}")
                return Verdict("unsupported", str(error))
            except Wrong as error:
                if torch_is_wrong(model, version, on_mixing="exact"):
                    return Verdict("torch", str(error).split("\n")[0])
                if "second derivative" in str(error) and second_is_wrong(
                    model, version, on_mixing="exact"
                ):
                    return Verdict("torch", "its own second derivatives are wrong")
                if not repeats_itself(model, version):
                    return Verdict("torch", "its own gradients differ from one graph to the next")
                return Verdict("wrong", f"{'after refusal, ' if refused else ''}{error}")
            except ArithmeticError:
                return Verdict("nothing", "not finite")
            except Exception as error:
                import traceback

                where = traceback.extract_tb(error.__traceback__)
                at = " < ".join(
                    f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in where[:-6:-1]
                )
                return Verdict("crash", f"{type(error).__name__}: {error} at {at}")
        fallbacks += any(issubclass(w.category, pergrad.FallbackWarning) for w in caught)
    if refused:
        if interacts(model, data):
            return Verdict("mixed", refused, fallbacks, True)
        return Verdict("refused", f"no example depends on another: {refused}", fallbacks)
    return Verdict("exact", "", fallbacks)


def smallest(seed: int, kind: str) -> tuple[frozenset[int], Verdict]:
    """Leave out steps as long as the model still fails in the same way."""
    skip: frozenset[int] = frozenset()
    verdict = judge(seed)
    changed = True
    while changed:
        changed = False
        for i in reversed(range(Model(seed).count)):
            if i in skip:
                continue
            try:
                trial = judge(seed, skip | {i}, everything=True)
            except Exception:
                continue
            if trial.kind == kind:
                skip, verdict, changed = skip | {i}, trial, True
    return skip, verdict


def describe(seed: int, skip: frozenset[int]) -> str:
    model = Model(seed, skip)
    model.forward(model.data())
    return f"B={model.batch} x{(model.batch, *model.shape)} {' '.join(model.log)}"
