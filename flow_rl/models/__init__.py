"""Image generators behind one interface, and builders of tiny ones. Never imports Lightning."""

from flow_rl.models.image_model import Conditioning, ImageModel
from flow_rl.models.loading import load_image_model
from flow_rl.models.qwen_image_21 import QwenImage21

__all__ = ["Conditioning", "ImageModel", "QwenImage21", "load_image_model"]
