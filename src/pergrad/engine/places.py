"""Places in the user's model, in words.

Owns: how modules, parameters and ops are named in errors, warnings and tables.
Does not know: what is said of them.
"""

from pergrad.graph.walk import Graph


def place_of(graph: Graph, index: int) -> str:
    """Where an op is, in the names of the user's model."""
    own = [graph.targets[slot] for slot in graph.edges[index] if slot in graph.targets]
    if own:
        return f"of {owner_of(own[0])}"
    below = graph.names_below(index, 1)
    return f"after {owner_of(below[0])}" if below else "in the model"


def module_of(name: str) -> str:
    """The path of the module that owns a parameter, by the parameter's name; "" for the model."""
    return name.rpartition(".")[0]


def owner_of(name: str) -> str:
    """The place of a parameter in words."""
    module = module_of(name)
    return f"module `{module}`" if module else f"parameter `{name}`"
