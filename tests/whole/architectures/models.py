"""Collects the architectures of every family."""

from . import by_hand, hugging_face, images, more_transformers, packages, pretrained
from .registry import ARCHITECTURES

__all__ = ["ARCHITECTURES"]
_ = (by_hand, hugging_face, more_transformers, images, packages, pretrained)
