"""Reference models, by name: ``create_model("convmixer", dim=256, depth=8)``."""

from .convmixer import ConvMixer
from .registry import ModelSpec, create_model, list_models, register_model, spec_of
from .resnet import ResNet
from .vit import ViT

__all__ = [
    "ConvMixer",
    "ModelSpec",
    "ResNet",
    "ViT",
    "create_model",
    "list_models",
    "register_model",
    "spec_of",
]
