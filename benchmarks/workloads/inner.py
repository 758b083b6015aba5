"""Inner products: a batch with itself, with 64 reference examples, with one fixed direction."""

from workloads.base import Target, Workload, register
from workloads.gpt import gpt
from workloads.mlp import mlp
from workloads.resnet import resnet

MODELS = {
    "mlp": ("the perceptron", lambda tiny: mlp(64, tiny), 20.0),
    "gpt": (
        "the GPT of width 768, T=128",
        lambda tiny: gpt(64, 128, tiny=tiny, references=64),
        1.3,
    ),
    "resnet": ("the ResNet-18", lambda tiny: resnet(64, tiny), 1.3),
}

for name, (title, build, faster) in MODELS.items():
    against_vmap = (Target("vmap slower", faster), Target("memory of vmap", 0.25))
    for task, words, targets in (
        ("gram", "all inner products within a batch", against_vmap),
        ("cross", "inner products with 64 other examples", against_vmap),
        ("direction", "inner product with one direction", (Target("time", 1.10),)),
    ):
        register(Workload(f"W7-{task}-{name}", f"{title}, B=64: {words}", task, build, targets))
