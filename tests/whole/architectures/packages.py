"""Models of packages for diffusion and graphs, and torchvision's segmentation, built small.

Owns: their configurations and losses.
Does not know: how results are compared.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .more_transformers import spread
from .registry import Problem, alive, architecture

BATCH = 3


def _random(number: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(BATCH, *shape, dtype=torch.float64, generator=generator)


def _ready(model: nn.Module) -> nn.Module:
    return alive(model.double().eval())


# --- Diffusion -----------------------------------------------------------------------------------

STEPS = torch.tensor([1, 50, 700])
BLOCKS = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
          "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}  # fmt: skip


@architecture("diffusers-unet", "Packages", needs=("diffusers",))
def diffusers_unet() -> Problem:
    from diffusers import UNet2DModel

    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    model = _ready(UNet2DModel(**BLOCKS, down_block_types=down, up_block_types=up))
    return Problem(model, lambda k: spread((model(_random(k, 3, 8, 8), STEPS).sample,)))


@architecture("diffusers-unet-with-prompt", "Packages", needs=("diffusers",))
def diffusers_conditional() -> Problem:
    from diffusers import UNet2DConditionModel

    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    model = _ready(
        UNet2DConditionModel(
            **BLOCKS, down_block_types=down, up_block_types=up, cross_attention_dim=12
        )
    )

    def losses(number: int) -> Tensor:
        prompt = _random(number + 1, 5, 12)
        return spread((model(_random(number, 3, 8, 8), STEPS, prompt).sample,))

    return Problem(model, losses)


@architecture("diffusers-dit", "Packages", needs=("diffusers",))
def diffusers_transformer() -> Problem:
    from diffusers import DiTTransformer2DModel

    model = _ready(
        DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3,
            num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=1,
        )
    )  # fmt: skip

    def losses(number: int) -> Tensor:
        given = {"timestep": STEPS, "class_labels": torch.tensor([1, 2, 3])}
        return spread((model(_random(number, 3, 8, 8), **given).sample,))

    return Problem(model, losses)


@architecture("diffusers-autoencoder", "Packages", needs=("diffusers",))
def diffusers_autoencoder() -> Problem:
    from diffusers import AutoencoderKL

    model = _ready(
        AutoencoderKL(
            block_out_channels=(8, 16), in_channels=3, out_channels=3, latent_channels=2,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        )
    )  # fmt: skip

    def losses(number: int) -> Tensor:
        latent = model.encode(_random(number, 3, 16, 16)).latent_dist.mean
        return spread((model.decode(latent).sample,))

    return Problem(model, losses)


# --- Graphs --------------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "GCNConv": {}, "SAGEConv": {}, "GATConv": {"heads": 2}, "GATv2Conv": {"heads": 2},
    "TransformerConv": {"heads": 2}, "ChebConv": {"K": 3}, "ARMAConv": {}, "FeaStConv": {},
    "ResGatedGraphConv": {}, "GENConv": {}, "MFConv": {}, "FiLMConv": {},
    "EGConv": {"num_heads": 2},
}  # fmt: skip


def _graph_network(kind: str, options: dict[str, Any]) -> Problem:
    import torch_geometric.nn as layers

    convolution = getattr(layers, kind)
    first = convolution(5, 8, **options)
    second = convolution(8 * options.get("heads", 1), 4, **options)
    head = nn.Linear(4 * options.get("heads", 1), 1)
    model = _ready(nn.ModuleList([first, second, head]))
    sizes = torch.tensor([4, 6, 3])
    graph = torch.repeat_interleave(torch.arange(BATCH), sizes)

    def losses(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        edges = [
            start + torch.randint(0, size, (2, 2 * size), generator=generator)
            for size, start in zip(sizes.tolist(), (0, 4, 10), strict=True)
        ]
        x = torch.randn(13, 5, dtype=torch.float64, generator=generator)
        x = second(first(x, torch.cat(edges, 1)).relu(), torch.cat(edges, 1))
        pooled = layers.global_mean_pool(x, graph) + layers.global_max_pool(x, graph)
        return head(pooled)[:, 0].sin()

    return Problem(model, losses)


for _kind, _options in CONVOLUTIONS.items():
    architecture(f"geometric-{_kind}", "Packages", needs=("torch_geometric",))(
        partial(_graph_network, _kind, _options)
    )


# --- torchvision ---------------------------------------------------------------------------------


def _segmentation(name: str, options: dict[str, Any]) -> Problem:
    import torchvision

    build = getattr(torchvision.models.segmentation, name)
    model = alive(
        build(weights=None, weights_backbone=None, num_classes=5, **options).double().eval(), 0.02
    )

    def losses(number: int) -> Tensor:
        maps = model(_random(number, 3, 64, 64)).values()
        labels = torch.randint(0, 5, (BATCH, 64, 64), generator=torch.Generator().manual_seed(7))
        total = torch.zeros(BATCH, dtype=torch.float64)
        for logits in maps:
            size = logits.detach().abs().amax((1, 2, 3), keepdim=True)
            each = F.cross_entropy(logits / size, labels, reduction="none")
            total = total + each.mean((1, 2))
        return total

    return Problem(model, losses)


for _name, _how in (
    ("fcn_resnet50", {"aux_loss": True}),
    ("deeplabv3_mobilenet_v3_large", {}),
    ("lraspp_mobilenet_v3_large", {}),
):
    architecture(f"torchvision-{_name}", "Packages", needs=("torchvision",))(
        partial(_segmentation, _name, _how)
    )
