"""Names, shapes and saved numbers of graph nodes.

Owns: op names in the words of aten, `Meta`, edges, saved numbers, and the outline of a node.
Does not know: saved tensors, passes.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import count
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pergrad.errors import UnsupportedError

Node = Any  # torch.autograd.graph.Node is an ABC that C++ nodes only pretend to implement


class Meta(NamedTuple):
    """Shape, dtype and device of one output of a node."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


# Overloads of one op that differ in what they reduce: the number behind "Backward" tells.
_OVERLOADS = {
    "SumBackward1": "sum_dim",
    "MeanBackward1": "mean_dim",
    "NormBackward1": "norm_dim",
    "NormBackward3": "norm_dim",
    "ProdBackward1": "prod_dim",
    "MaxBackward0": "max_dim",
    "MinBackward0": "min_dim",
    "MedianBackward1": "median_dim",
    "NanmedianBackward1": "nanmedian_dim",
}


@lru_cache(maxsize=4096)
def _op_of_type_name(name: str) -> str:
    """AddmmBackward0 -> addmm; torch::autograd::CopySlices -> copy_slices."""
    if name in _OVERLOADS:
        return _OVERLOADS[name]
    short = name.rsplit("::", 1)[-1]
    short = re.sub(r"Backward\d*$", "", short) or short
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[0-9])(?=[A-Z][a-z])|(?<=[0-9]D)(?=[A-Z])", "_", short)
    return snake.lower()


_Python = torch.autograd.function.BackwardCFunction


def is_python(node: Node) -> bool:
    """Whether the node belongs to a `torch.autograd.Function` written in Python."""
    return isinstance(node, _Python)


OWN = {cls for cls in vars(torch._C._functions).values() if isinstance(cls, type)}


def is_torchs(node: Node) -> bool:
    """Whether the op is one of torch's own: no Function in Python, and none of another package."""
    return type(node) in OWN


def in_python(found: Iterable[Node]) -> list[Node]:
    """Those that belong to a `torch.autograd.Function` written in Python."""
    return [node for node in found if isinstance(node, _Python)]


def op_name(node: Node) -> str:
    """The op in the words of aten: "addmm", "native_layer_norm"; a Function's class name."""
    if is_python(node):
        name = node.name().removesuffix("Backward")
        # A class called `add` is not torch's op of that name.
        return name + ".apply" if name == name.lower() else name
    return _op_of_type_name(node.name())


def is_compiled(node: Node) -> bool:
    """Whether the node is a whole region compiled by torch.compile."""
    return is_python(node) and op_name(node).startswith("CompiledFunction")


_REGIONS: WeakKeyDictionary[type, int] = WeakKeyDictionary()
_count = count()


def region_number(node: Node) -> tuple[int, ...]:
    """A number that no other compiled region has, and the sizes that were left open; else ()."""
    if not is_compiled(node):
        return ()
    cls = node._forward_cls
    number = _REGIONS.get(cls)
    if number is None:
        number = _REGIONS[cls] = next(_count)
    return (number, *(int(size) for size in getattr(node, "symints", None) or ()))


def metas(node: Node) -> tuple[Meta, ...]:
    """Shape, dtype, device of each output of the op (= of each cotangent the node takes)."""
    outputs = _input_metadata(node)
    try:
        return tuple([Meta(tuple(m.shape), m.dtype, m.device) for m in outputs])
    except RuntimeError as error:
        raise nested(node) from error


def nested(node: Node) -> UnsupportedError:
    """For an op whose output has no shape of whole numbers."""
    return UnsupportedError(
        f"The op `{op_name(node)}` returns a nested tensor, whose rows differ in length, and "
        "pergrad cannot tell which of its numbers belong to which example. Use padded tensors "
        "(`to_padded_tensor`) with a mask, or a PackedSequence, for this call."
    )


def _input_metadata(node: Node) -> Any:
    try:
        return node._input_metadata
    except AttributeError:
        raise UnsupportedError(other_fields(node.name(), "_input_metadata")) from None


# (node, output number) of each differentiable input of the op; None where it needs none.
edges: Callable[[Node], tuple[tuple[Node | None, int], ...]] = attrgetter("next_functions")


def leaf_variable(node: Node) -> Tensor | None:
    """The leaf tensor that an AccumulateGrad node stands for."""
    return getattr(node, "variable", None)


_FIELDS: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {}  # one entry per kind of node


def fields(cls: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(plain attributes, tensors) that a node class saves, without their prefixes."""
    known = _FIELDS.get(cls)
    if known is None:
        names = dir(cls)
        tensors = {n.removeprefix("_raw_saved_") for n in names if n.startswith("_raw_saved_")}
        plain = [n.removeprefix("_saved_") for n in names if n.startswith("_saved_")]
        known = tuple(n for n in plain if n not in tensors), tuple(sorted(tensors))
        if issubclass(cls, _Python):
            return known  # a Function's class may be made anew for every model
        _FIELDS[cls] = known
    return known


def _signed(value: Any) -> Any:
    """Dimensions are stored unsigned: 2**64 - 1 is -1."""
    kind = type(value)
    if kind is int:
        return value if value < 2**63 else value - 2**64
    if kind is float:
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_signed(v) for v in value)
    if isinstance(value, torch.SymInt):
        return int(value)
    return value


# (op, field) -> what this op, or another release of torch, calls it.
RENAMED = {
    ("cudnn_batch_norm", "eps"): "epsilon",
    ("miopen_batch_norm", "eps"): "epsilon",
}


def renamed(node: Node, field: str) -> str:
    """The other name of a field that the node does not have.

    Raises:
        UnsupportedError: there is none.
    """
    name = RENAMED.get((op_name(node), field))
    if name is None or not hasattr(type(node), "_saved_" + name):
        raise UnsupportedError(other_fields(node.name(), field))
    return name


@lru_cache(maxsize=1)
def _classes() -> dict[str, list[type]]:
    """torch's classes of nodes, by op: one for each overload."""
    found: dict[str, list[type]] = {}
    module = torch._C._functions
    for name in dir(module):
        cls = getattr(module, name)
        if isinstance(cls, type):
            found.setdefault(_op_of_type_name(name), []).append(cls)
    return found


def has_op(name: str) -> bool:
    """Whether the installed torch has a class of nodes for the op."""
    return name in _classes()


def check_saved(name: str, needs: Iterable[str]) -> None:
    """Whether torch saves these fields with an op (some overload of it), if it has the op at all.

    Raises:
        UnsupportedError: it does not, under no name that is known here.
    """
    classes = _classes().get(name, [])
    for field in needs:
        names = ("_saved_" + field, f"_saved_{RENAMED.get((name, field))}")
        if classes and not any(hasattr(cls, one) for cls in classes for one in names):
            raise UnsupportedError(other_fields(classes[0].__name__, field))


def attribute(node: Node, field: str) -> Any:
    """One saved number, dimension or size of an op, e.g. "dim"; None for an argument left out.

    Raises:
        UnsupportedError: this release of torch saves something else.
    """
    try:
        return _signed(getattr(node, "_saved_" + field))
    except AttributeError:
        return _signed(getattr(node, "_saved_" + renamed(node, field)))


def other_fields(kind: str, field: str) -> str:
    """The message to whoever has a release of torch that saves something else."""
    return (
        f"torch {torch.__version__} does not save `{field}` with {kind}, so pergrad has "
        "no rule for it. Use a version of torch that pergrad is tested with (see the README)."
    )


def attributes(node: Node) -> tuple[Any, ...]:
    """Everything a node saved that is not a tensor, hashable: what a plan's key must hold."""
    if is_python(node):
        return region_number(node)
    plain, _ = fields(type(node))
    return tuple([_hashable(_signed(getattr(node, "_saved_" + name))) for name in plain])


_READERS: dict[type, Callable[[Node], Any]] = {}  # one entry per kind of node
_Leaf: type = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


def _reader(cls: type) -> Callable[[Node], Any]:
    """Reads all plain attributes of a node of this class."""
    if issubclass(cls, _Python):
        return _nothing  # such a class may be made anew for every model
    names = ["_saved_" + name for name in fields(cls)[0]]
    _READERS[cls] = reader = attrgetter(*names) if names else _nothing
    return reader


def _nothing(_: Node) -> tuple[()]:
    return ()


def outline(node: Node) -> tuple[Any, ...]:
    """Name, shapes, dtypes and saved numbers as they come: fast to make, equal for equal nodes.

    Not always hashable: see `attributes`. Numbers are as torch stores them, unsigned.
    """
    cls = type(node)
    if cls is _Leaf:  # many, and faster so
        # what it was when it entered the graph, not what has been put in its place since
        (m,) = _input_metadata(node)
        return tuple(m.shape), m.dtype
    known = _READERS.get(cls)  # of torch's own nodes alone
    try:
        numbers = (known or _reader(cls))(node)
        outputs = node._input_metadata
    except AttributeError as error:
        raise UnsupportedError(other_fields(node.name(), error.name or "_input_metadata")) from None
    name = node.name()
    if known is None and is_python(node):
        name, numbers = op_name(node), region_number(node)
    try:
        if len(outputs) == 1:  # the most
            (m,) = outputs
            return name, tuple(m.shape), m.dtype, numbers
        return name, tuple([(tuple(m.shape), m.dtype) for m in outputs]), numbers
    except RuntimeError as error:
        raise nested(node) from error


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value
