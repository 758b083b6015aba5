"""The workloads. Importing this registers all of them, in the order of the report."""

from workloads import mlp, gpt, resnet, vit, encoder, inner, clipping, lengths  # noqa: F401, I001
from workloads.base import REGISTRY, TASKS, Step, Target, Workload, chosen

__all__ = ["REGISTRY", "TASKS", "Step", "Target", "Workload", "chosen"]
