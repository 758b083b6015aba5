"""One step of training with clipped per-example gradients."""

from workloads.base import Target, Workload, register
from workloads.gpt import gpt
from workloads.mlp import mlp
from workloads.resnet import resnet

MODELS = {
    "mlp": ("the perceptron, B=1024", lambda tiny: mlp(1024, tiny), 1.10),
    "gpt": ("the GPT of width 768, T=128, B=8", lambda tiny: gpt(8, 128, tiny=tiny), 1.20),
    "resnet": ("the ResNet-18, B=64", lambda tiny: resnet(64, tiny), 1.20),
}

for name, (title, build, bound) in MODELS.items():
    register(
        Workload(
            f"W8-clip-{name}",
            f"{title}: norms, and the sum of the gradients clipped to norm 1",
            "clip",
            build,
            (Target("time", bound), Target("opacus slower", 1.5)),
        )
    )
