"""All that the ranks of any test import, for the server that they fork from: diffusers and transformers import late."""

from __future__ import annotations

from tests.dist import dist_checks  # noqa: F401
from tests.dist import dist_loading  # noqa: F401
from tests.dist import dist_runs  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
from diffusers import AutoencoderKLQwenImage, QwenImage21Pipeline, QwenImagePipeline  # noqa: F401
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration  # noqa: F401
