"""The verbs: what users call.

Owns: one function per question, each a thin consumer of the factors that one pass delivers.
Does not know: how factors come about.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from pergrad import inputs
from pergrad.clipping import Clip
from pergrad.coverage import Coverage, coverage_of
from pergrad.engine import reading_pass
from pergrad.engine.accumulation import accumulate
from pergrad.engine.late_norms import Doubts, adding_to
from pergrad.engine.pass_ import Emit, Explained
from pergrad.engine.places import module_of
from pergrad.engine.run import Options, OptionsGiven, run
from pergrad.engine.totals import Total
from pergrad.engine.user_state import Held
from pergrad.errors import UnsupportedError, UsageError
from pergrad.factors import Factor
from pergrad.factors.workspace import workspace
from pergrad.graph import nodes, sharded
from pergrad.graph.walk import walk
from pergrad.inputs import Direction, Params
from pergrad.matrix import GradientMatrix, root, zeros_for

_DEFAULT = Options()
Weights = Tensor | float | Callable[[Tensor], Tensor] | None


def _prepare(losses: Tensor, params: Params, options: OptionsGiven) -> tuple:
    try:
        chosen = Options(**options) if options else _DEFAULT
    except TypeError:
        fields = Options.__dataclass_fields__
        wrong = [name for name in options if name not in fields]
        meant = inputs.meant(wrong, fields)
        if any("clip" in name or "norm" in name for name in wrong):
            meant = " To clip each gradient, say pergrad.backward(..., weights=pergrad.clip(1.0))."
        elif any("weight" in name for name in wrong):
            meant = " Weights of the examples go to pergrad.backward(..., weights=...)."
        raise UsageError(
            f"Unknown option {', '.join(wrong)}.{meant} The options are: {', '.join(fields)}."
        ) from None
    if isinstance(losses, Tensor) and nodes.is_transformed(losses):
        raise UsageError(
            "`losses` belongs to a transform of torch.func (vmap, grad, ...), which is still under "
            "way. Return the losses from the transformed function and call pergrad outside; for "
            "derivatives of a result, pass create_graph=True instead of using torch.func.grad."
        )
    named = sharded.whole(inputs.named(params))
    losses = inputs.check_losses(losses)
    return named, losses, chosen


def result_dtype(named: Mapping[str, Tensor]) -> torch.dtype:
    """That of the parameters, never less than float32."""
    dtype = torch.float32
    for other in {p.dtype for p in named.values()}:
        if other.is_floating_point:
            dtype = torch.promote_types(dtype, other)
    return dtype


def _stream(
    losses: Tensor, named: Mapping[str, Tensor], options: Options, emit: Emit, **more: Any
) -> None:
    with sharded.gathered(
        losses, named.values(),
        retain_graph=options.retain_graph, create_graph=options.create_graph,
    ), workspace(options.chunk_bytes, losses.device):  # fmt: skip
        if losses.shape[0] > 0:
            run(losses, named, options, emit, **more)


def _stream_sq_norms(
    losses: Tensor,
    named: Mapping[str, Tensor],
    options: Options,
    add: Callable[[str, Tensor], None],
) -> None:
    """Call `add` with squared norms (B,) of each parameter, once or more often."""
    doubts = Doubts()

    def emit(name: str, factor: Factor) -> None:
        doubts.sq_norms(name, factor, partial(add, name))

    _stream(losses, named, options, emit, finish=doubts.settle, adding=True, squares=add)


def norms(losses: Tensor, params: Params, **options: Unpack[OptionsGiven]) -> Tensor:
    """The L2 norm of the gradient of each loss.

        norms[b] = | d losses[b] / d params |

    One backward pass that skips the weight gradients; no per-example gradient is formed where a
    rule knows better.

    Args:
        losses: (B,), one loss per example, attached to its graph.
        params: the model, a mapping from names to tensors, or an iterable of tensors. Only those
            that require grad count. One tensor under two names counts once.
        retain_graph: keep the graph for another pass over the same losses (default False), as in
            `torch.autograd.grad`.
        create_graph: the result can be differentiated (default False); keeps the graph, too.
        on_mixing: "raise" (default) refuses ops that make examples interact, such as batch norm in
            training mode; "exact" pays up to one backward pass per loss for them.
        check_layout: when to measure which rows are whose: "once" (default) for each form of graph,
            "always", or "never".
        chunk_bytes: budget for temporary buffers (default None: a share of free memory).

    Returns:
        (B,), in the unit of loss per unit of parameter; not divided by B. The parameters' dtype, at
        least float32. 0 for an example that reaches no parameter.

    Raises:
        UsageError: the losses are not a vector with a graph, or no parameter requires grad.
        MixedExamplesError: an op makes examples interact (see on_mixing).
        UnsupportedError: a parameter's gradients cannot be had.

    Cost: about 0.7 to 1.0 of a forward and backward pass, its memory plus O(B).
    Source: Goodfellow 2015, arXiv:1510.01799, for linear layers; docs/how-it-works.md for the rest.

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> pergrad.norms(model(x).squeeze(1), model)
        tensor([5., 1.])
    """
    named, losses, chosen = _prepare(losses, params, options)
    total = Total(losses, result_dtype(named), (losses.shape[0],))
    _stream_sq_norms(losses, named, chosen, lambda _, squares: total.add(squares))
    return _result(root(total.value).to(total.dtype), chosen)


def norms_by_parameter(
    losses: Tensor, params: Params, **options: Unpack[OptionsGiven]
) -> dict[str, Tensor]:
    """The L2 norm of each loss's gradient, parameter by parameter.

        result[name][b] = | d losses[b] / d params[name] |

    Args:
        losses: (B,), as in `norms`.
        params: as in `norms`.
        **options: retain_graph, create_graph, on_mixing, check_layout, chunk_bytes, as in `norms`.

    Returns:
        name -> (B,), in the order of the parameters; zeros for a parameter the losses do not reach.

    Raises:
        UsageError, MixedExamplesError, UnsupportedError: as in `norms`.

    Cost: as `norms`.

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> pergrad.norms_by_parameter(model(x).squeeze(1), model)
        {'weight': tensor([5., 1.]), 'bias': tensor([1., 1.])}
    """
    named, losses, chosen = _prepare(losses, params, options)
    dtype = result_dtype(named)
    found: dict[str, Tensor] = {}
    _stream_sq_norms(losses, named, chosen, adding_to(found, dtype))
    batch = losses.shape[0]
    return {
        name: _result(root(found[name]).to(dtype), chosen) if name in found
        else torch.zeros(batch, dtype=dtype, device=p.device)
        for name, p in named.items()
    }  # fmt: skip


def gram(losses: Tensor, params: Params, **options: Unpack[OptionsGiven]) -> Tensor:
    """All inner products between the gradients of the batch.

        gram[b, c] = < d losses[b] / d params, d losses[c] / d params >

    Args:
        losses: (B,), as in `norms`.
        params: as in `norms`.
        **options: retain_graph, create_graph, on_mixing, check_layout, chunk_bytes, as in `norms`.

    Returns:
        (B, B), symmetric; the diagonal holds the squared norms.

    Raises:
        UsageError, MixedExamplesError, UnsupportedError: as in `norms`.

    Cost: for linear layers on one position per example O(B²(d + p)); on T positions per example the
        cheaper of B²T²(d + p) and BTdp + B²dp. Memory plus O(B²).

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> pergrad.gram(model(x).squeeze(1), model)
        tensor([[25.,  4.],
                [ 4.,  1.]])
    """
    named, losses, chosen = _prepare(losses, params, options)
    total = Total(losses, result_dtype(named), (losses.shape[0],) * 2)
    _stream(losses, named, chosen, lambda name, f: total.add(f.gram(f)))
    return _result(total.value, chosen)


def dots(
    losses: Tensor,
    params: Params,
    *,
    against: GradientMatrix | Direction,
    **options: Unpack[OptionsGiven],
) -> Tensor:
    """Inner products of each loss's gradient with given gradients or a given direction.

        dots[b, k] = < d losses[b] / d params, row k of against >
        dots[b]    = < d losses[b] / d params, direction >

    Args:
        losses: (B,), as in `norms`.
        params: as in `norms`.
        against: a GradientMatrix with K rows (parameters are matched by name), or a direction: a
            mapping from names to tensors, a sequence of tensors shaped as the parameters, or one
            flat tensor (P,).
        **options: retain_graph, create_graph, on_mixing, check_layout, chunk_bytes, as in `norms`.

    Returns:
        (B, K) against a GradientMatrix, (B,) against a direction.

    Raises:
        UsageError: names or shapes do not match; otherwise as in `norms`.
        MixedExamplesError, UnsupportedError: as in `norms`.

    Cost: against a direction one more forward-like product per layer; against K rows as `gram`.

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> reference = pergrad.gradients(model(x[:1]).squeeze(1), model)
        >>> pergrad.dots(model(x).squeeze(1), model, against=reference)
        tensor([[25.],
                [ 4.]])
        >>> pergrad.dots(model(x).squeeze(1), model, against=torch.tensor([1.0, 0.0]))
        tensor([3., 0.])
    """
    named, losses, chosen = _prepare(losses, params, options)
    batch = losses.shape[0]
    if isinstance(against, GradientMatrix):
        own = GradientMatrix(zeros_for(named, {}, batch), batch)
        own._check_match(against)
        against._check_versions()
        total = Total(losses, result_dtype(named), (batch, len(against)))
        factors = against._factors
        _stream(losses, named, chosen, lambda name, f: total.add(f.gram(factors[name])))
    else:
        shapes = {name: tuple(p.shape) for name, p in named.items()}
        v = inputs.direction(against, shapes, {name: p.device for name, p in named.items()})
        total = Total(losses, result_dtype(named), (batch,))
        _stream(
            losses,
            named,
            chosen,
            lambda name, f: total.add(f.matvec(v[name])),
            adding=True,
        )
    return _result(total.value, chosen)


def gradients(losses: Tensor, params: Params, **options: Unpack[OptionsGiven]) -> GradientMatrix:
    """The matrix of per-example gradients, lazily.

        J[b] = d losses[b] / d params

    Args:
        losses: (B,), as in `norms`.
        params: as in `norms`.
        **options: retain_graph, create_graph, on_mixing, check_layout, chunk_bytes, as in `norms`.

    Returns:
        A GradientMatrix (B, P): J.norms(), J @ K.T, J @ v, J.T @ c, J[i], J.dense(), ...

    Raises:
        UsageError, MixedExamplesError, UnsupportedError: as in `norms`.

    Cost: time as `norms`; keeps the inputs of the layers and the gradients at their outputs.

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> J = pergrad.gradients(model(x).squeeze(1), model)
        >>> J
        GradientMatrix(2 examples x 2 parameters in 1 tensors, torch.float32, cpu; holds 24 B, dense 16 B)
        >>> J.norms()
        tensor([5., 1.])
    """  # noqa: E501
    named, losses, chosen = _prepare(losses, params, options)
    found: dict[str, Held] = {}
    owned: set[int] = set()

    def emit(name: str, factor: Factor) -> None:
        if not owned:  # not before: sharded parameters have no memory between steps
            owned.update(p.untyped_storage().data_ptr() for p in named.values())
            owned.update(sharded.storages())
        found[name] = Held(_kept(factor, owned, chosen.create_graph))

    _stream(losses, named, chosen, emit)
    batch = losses.shape[0]
    factors = {name: held.factor(name) for name, held in found.items()}
    return GradientMatrix(zeros_for(named, factors, batch), batch, chosen.chunk_bytes)


def _kept(factor: Factor, owned: set[int], live: bool) -> Factor:
    """What outlives the graph: no vector-Jacobian products left to do, no parameter's memory."""
    factor = factor.materialized()
    if live:
        return factor
    if any(t.untyped_storage().data_ptr() in owned for t in factor.tensors()):
        # An optimizer step must not change what was computed before it.
        factor = factor.cloned()
    return factor.detach()


def backward(
    losses: Tensor, params: Params, weights: Weights = None, **options: Unpack[OptionsGiven]
) -> Tensor:
    """Add the weighted sum of all gradients to `.grad`, B times that of a mean; return the norms.

        params.grad += sum over b of weights[b] * d losses[b] / d params

    It stands in for `losses.sum().backward()`; for that of a mean, pass `weights=1 / B` or
    `weights=pergrad.clip(1.0, mean=True)`.

    Args:
        losses: (B,), as in `norms`.
        params: as in `norms`.
        weights: None for ones, a tensor (B,), one number for all (1 / B if your loss is a mean), or
            a function from the norms (B,) to weights (B,) such as `pergrad.clip(1.0)`. Where a
            function of yours gives 0 for a norm that is not finite, the example is left out.
        **options: retain_graph, on_mixing, check_layout, chunk_bytes, as in `norms`.

    Returns:
        (B,), the norms of the unweighted gradients.

    Raises:
        UsageError: weights of another length or dtype; otherwise as in `norms`.
        MixedExamplesError, UnsupportedError: as in `norms`.

    Cost: about that of a forward and backward pass, plus 5 to 20 %. With weights, the inputs of
        layers and the gradients at their outputs are kept until the norms are known.
    Source: book-keeping, Bu et al. 2023, arXiv:2210.00038.

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> pergrad.backward(model(x).squeeze(1), model, weights=pergrad.clip(1.0))
        tensor([5., 1.])
        >>> model.weight.grad
        tensor([[0.6000, 1.8000]])
    """
    if options.get("create_graph"):
        raise UsageError(
            "backward writes to .grad and cannot be differentiated. Use pergrad.gradients with "
            "create_graph=True."
        )
    named, losses, chosen = _prepare(losses, params, options)
    batch = losses.shape[0]
    number = 1.0
    if isinstance(weights, (int, float)) and not isinstance(weights, bool):
        number, weights = float(weights), None
    if weights is not None and not callable(weights):
        weights = inputs.check_weights(weights, losses)
    for name, p in named.items():
        if not p.is_leaf:
            raise UsageError(
                f"`{name}` is not a leaf tensor, so it has no .grad to add to. Pass the leaves, or "
                "use `pergrad.gradients(...).T @ weights`."
            )
        if sharded.is_sharded(p):
            raise UnsupportedError(
                f"The parameter `{name}` is sharded by fully_shard, and so is its .grad, which "
                "FSDP alone fills. Take the norms first and weigh the losses: "
                "`norms = pergrad.norms(losses, model, retain_graph=True)`, then "
                "`(weights * losses).sum().backward()`."
            )
    total = Total(losses, result_dtype(named), (batch,))
    if batch == 0:
        for name in walk(losses, named).targets.values():  # an optimizer's step wants zeros
            accumulate(named[name], torch.zeros_like(named[name]))
        return total.value
    kept: dict[str, Held] = {}
    dtype, layers = result_dtype(named), dict[str, Total]()
    clipper = weights if isinstance(weights, Clip) and weights.by is not None else None
    doubts, read = Doubts(), reading_pass.taken_over(losses, named)

    def emit(name: str, factor: Factor) -> None:
        factor = factor.formed()  # the norm and the sum need the same rows
        add = total.add
        if clipper is not None:
            add = layers.setdefault(module_of(name), Total(losses, dtype, (batch,))).add
        doubts.sq_norms(name, factor, add if read is None else read.besides(name, add))
        # The graph may be gone when the weights are known, so nothing may be left to pull.
        kept[name] = Held(factor.materialized())

    with workspace(chosen.chunk_bytes, losses.device):
        run(losses, named, chosen, emit, finish=doubts.settle)
        for layer in layers.values():
            total.add(layer.value)
        norms_ = root(total.value).to(total.dtype)
        found: dict[str, Tensor] = {}
        kept_rows: Tensor | None = None  # where some are left out, for 0 * NaN is NaN
        if clipper is not None:
            found = clipper.by_layer(
                {name: root(t.value).to(t.dtype) for name, t in layers.items()}
            )
        elif callable(weights):
            may_leave_out = not isinstance(weights, Clip)
            weights = inputs.check_weights(weights(norms_), losses)
            if may_leave_out and bool((out := (weights == 0) & ~norms_.isfinite()).any()):
                kept_rows = torch.nonzero(~out).flatten()
        rows = weights if isinstance(weights, Tensor) else torch.full_like(norms_, number)
        if read is not None:
            read.told(rows, by_layer=clipper is not None)
        with torch.no_grad():  # what an op saved has a history
            # A hook may step in the backward pass, and so change what other factors hold.
            steps = any(nodes.hooks_after_accumulation(p) for p in named.values())
            sums: dict[str, Tensor] = {}
            for name in list(kept):
                factor, own = kept.pop(name).factor(name), found.get(module_of(name), rows)
                own = own.to(norms_.dtype).to(factor.device, factor.dtype)
                if kept_rows is not None:
                    index = kept_rows.to(factor.device)
                    factor, own = factor.select(index), own[index]
                sums[name] = factor.weighted_gradient(own)
                if not steps:
                    accumulate(named[name], sums.pop(name))
        for name in list(sums):
            accumulate(named[name], sums.pop(name))
    return norms_


def explain(losses: Tensor, params: Params, **options: Unpack[OptionsGiven]) -> Coverage:
    """How every use of every parameter is served: the contract made visible.

    Runs one pass like `norms` with the graph retained; interacting examples are shown, not refused.

    Args:
        losses: (B,), as in `norms`.
        params: as in `norms`.
        **options: check_layout, chunk_bytes, as in `norms`.

    Returns:
        A Coverage: prints as a table; `.rows` with parameter, module, op, how ("rule", "fallback",
        "mixed", "unreached"), layout, method and cost; `.exact_share`; `.price`, what several
        losses for each row of data cost.

    Raises:
        UsageError, UnsupportedError: as in `norms`.

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(2, 1)
        >>> print(pergrad.explain(model(torch.ones(3, 2)).squeeze(1), model))
        parameter  module   op     how   layout         method  cost
        weight     (model)  addmm  rule  example-major  rows       9
        bias       (model)  addmm  rule  example-major  sum        3
        2 parameters (3 numbers): 100.0 % by rule, 0.0 % by fallback, 0.0 % mixed
    """
    kept: OptionsGiven = {**options, "retain_graph": True, "on_mixing": "exact"}
    named, losses, chosen = _prepare(losses, params, kept)
    told = Explained()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _stream(losses, named, chosen, lambda name, f: None, told=told)
    return coverage_of(named, told.records, losses.shape[0], told.price)


def _result(value: Tensor, options: Options) -> Tensor:
    return value if options.create_graph else value.detach()
