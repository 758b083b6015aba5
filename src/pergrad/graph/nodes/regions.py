"""Nodes that stand for more than one op.

Owns: recognising re-entrant checkpoints and DDP's sink.
Does not know: what is done about them.
"""

from pergrad.graph.nodes.reading import Node, is_python, op_name


def reentrant_checkpoint(node: Node) -> bool:
    """Whether the node is a re-entrant activation checkpoint, which hides its parameters."""
    if not is_python(node):
        return False
    import torch.utils.checkpoint as checkpoint

    return getattr(type(node), "_forward_cls", None) is checkpoint.CheckpointFunction


def first_static_backward(node: Node) -> bool:
    """Whether a backward through the node would be taken for DDP's first one.

    With static_graph=True that pass decides which gradients are synchronised from then on: should
    it not compute them all, none is ever synchronised again.
    """
    if not is_python(node) or op_name(node) != "_DDPSink":
        return False
    module = node.ddp_weakref()
    return bool(module.static_graph and not module._static_graph_delay_allreduce_enqueued)
