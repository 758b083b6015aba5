"""Image models of timm, with random weights.

Owns: the list of names, and for each the smallest image it takes or a way to shrink it.
Does not know: how results are compared.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Problem, alive, architecture

BATCH, CLASSES = 2, 10


def _losses(model: Any, size: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randn(BATCH, 3, size, size, dtype=torch.float64, generator=generator)
    logits = model(pixels)
    if isinstance(logits, (tuple, list)):
        logits = sum(logits)
    # Random weights may make numbers of any size; the loss then is flat, its gradient zero.
    logits = logits / logits.detach().abs().amax(1, keepdim=True)
    targets = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    return F.cross_entropy(logits, targets, reduction="none")


def _build(name: str, size: int, options: dict[str, Any]) -> Problem:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
    model = alive(model.double().eval(), 0.02)
    return Problem(model, partial(_losses, model, size))


_SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4}

# name -> (side of the image, options that make the model small)
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {}),
    "resnet50": (32, {}),
    "vit_tiny_patch16_224": (32, {"img_size": 32, **_SMALL}),
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32, **_SMALL}),
    "swin_tiny_patch4_window7_224": (
        56, {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}),
    "swinv2_tiny_window8_256": (
        64, {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}),
    "convnext_atto": (32, {}),
    "efficientnet_b0": (32, {}),
    "mobilenetv3_small_100": (32, {}),
    "regnety_002": (32, {}),
    "densenet121": (32, {}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "beit_base_patch16_224": (32, {"img_size": 32, **_SMALL}),
    "eva02_tiny_patch14_224": (28, {"img_size": 28, **_SMALL}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64}),
    "coatnet_0_rw_224": (64, {"img_size": 64}),
    "nfnet_l0": (32, {}),
    "resnetv2_50x1_bit": (32, {}),
    "inception_v3": (96, {}),
    "vgg11_bn": (32, {}),
    "xcit_nano_12_p16_224": (32, {"img_size": 32}),
    "levit_128s": (64, {"img_size": 64}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "pvt_v2_b0": (64, {}),
    "volo_d1_224": (64, {"img_size": 64}),
    "cait_xxs24_224": (32, {"img_size": 32}),
    "res2net50_14w_8s": (32, {}),
    "botnet26t_256": (64, {"img_size": 64}),
    "halonet26t": (256, {}),
    "lambda_resnet26t": (64, {}),
    "tnt_s_patch16_224": (32, {"img_size": 32}),
    "poolformer_s12": (32, {}),
    "gmlp_s16_224": (32, {"img_size": 32}),
    "hrnet_w18_small": (32, {}),
    "selecsls42": (32, {}),
    "repvgg_a0": (32, {}),
    "dla34": (32, {}),
    "edgenext_xx_small": (64, {}),
    "fastvit_t8": (64, {}),
    "efficientformer_l1": (224, {}),
    "visformer_tiny": (64, {"img_size": 64}),
    "convit_tiny": (32, {"img_size": 32, **_SMALL}),
    "crossvit_tiny_240": (240, {}),
    "twins_svt_small": (64, {"img_size": 64}),
    "nest_tiny": (64, {"img_size": 64}),
    "mobilevit_xxs": (64, {}),
    "davit_tiny": (64, {}),
    "focalnet_tiny_srf": (64, {}),
    "hiera_tiny_224": (64, {"img_size": 64}),
    "vit_small_patch14_dinov2": (28, {"img_size": 28, **_SMALL}),
}  # fmt: skip

for _name, (_size, _options) in MODELS.items():
    architecture(f"timm-{_name}", "timm", needs=("timm", "torchvision"))(
        partial(_build, _name, _size, _options)
    )
