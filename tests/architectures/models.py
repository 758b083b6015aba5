"""Collects the architectures of every family."""

from . import by_hand, hugging_face, images, pretrained
from .registry import ARCHITECTURES

__all__ = ["ARCHITECTURES"]
_ = (by_hand, hugging_face, images, pretrained)
