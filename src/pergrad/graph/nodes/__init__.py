"""Nodes of torch's autograd graph, read.

Owns: every private name of torch that pergrad relies on (`_saved_*`, `_input_metadata`, node
names, direct calls of a node). A new release of torch is a change in this folder.
Does not know: examples, layouts, parameters' names, rules.
"""

from torch.autograd.graph import GradientEdge, get_gradient_edge

from pergrad.graph.nodes.calls import call, raw_call
from pergrad.graph.nodes.compiled import (
    Stand,
    arguments_by_name,
    changes_something,
    compiled_regions_kept,
    made_by_inductor,
    never_compiled,
    region_arguments,
    region_class,
    region_graph,
    shapes_within,
    with_reshapes,
)
from pergrad.graph.nodes.hooks import (
    before,
    call_tensor_hooks,
    hooks_after_accumulation,
    hooks_of_node,
    hooks_registered,
    tensor_hooks,
)
from pergrad.graph.nodes.passes import (
    after_pass,
    gradients,
    inside_pass,
    outside_pass,
    pass_number,
    starts_under_way,
    will_run,
)
from pergrad.graph.nodes.reading import (
    Meta,
    Node,
    attribute,
    attributes,
    check_saved,
    edges,
    has_op,
    in_python,
    is_compiled,
    is_python,
    leaf_variable,
    metas,
    op_name,
    outline,
    region_number,
)
from pergrad.graph.nodes.regions import first_static_backward, reentrant_checkpoint
from pergrad.graph.nodes.tensors import (
    hooks_aside,
    is_flattened,
    is_transformed,
    no_overrides,
    version,
    wraps_tensors,
)
from pergrad.graph.nodes.unpacking import (
    in_our_words,
    is_checkpointed,
    saved,
    saved_plainly,
    selections_untouched,
    translate,
)

__all__ = [
    "GradientEdge",
    "Meta",
    "Node",
    "Stand",
    "after_pass",
    "arguments_by_name",
    "attribute",
    "attributes",
    "before",
    "call",
    "call_tensor_hooks",
    "changes_something",
    "check_saved",
    "compiled_regions_kept",
    "edges",
    "first_static_backward",
    "get_gradient_edge",
    "gradients",
    "has_op",
    "hooks_after_accumulation",
    "hooks_aside",
    "hooks_of_node",
    "hooks_registered",
    "in_our_words",
    "in_python",
    "inside_pass",
    "is_checkpointed",
    "is_compiled",
    "is_flattened",
    "is_python",
    "is_transformed",
    "leaf_variable",
    "made_by_inductor",
    "metas",
    "never_compiled",
    "no_overrides",
    "op_name",
    "outline",
    "outside_pass",
    "pass_number",
    "raw_call",
    "reentrant_checkpoint",
    "region_arguments",
    "region_class",
    "region_graph",
    "region_number",
    "saved",
    "saved_plainly",
    "selections_untouched",
    "shapes_within",
    "starts_under_way",
    "tensor_hooks",
    "translate",
    "version",
    "will_run",
    "with_reshapes",
    "wraps_tensors",
]
