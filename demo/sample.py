"""Draw from an exported student with plain diffusers: ``python -m demo.sample --model runs/demo/student/export ...``.

    ... --prompt "a portrait of a person with red hair" --output image.png
    ... --prompt "make the background blue" --source image.png --output edited.png

Nothing of this project is needed but its checkpoint. A student is drawn at guidance 1: it has learnt its teachers'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import QwenImage21Pipeline
from PIL import Image, ImageOps


def load(path: str | Path) -> QwenImage21Pipeline:
    """The pipeline of an export."""
    pipeline = QwenImage21Pipeline.from_pretrained(str(path))
    # The class assumes the released VAE's 16x; the demo's compresses 8x and says so.
    pipeline.vae_scale_factor = pipeline.vae.config.scale_factor_spatial
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: QwenImage21Pipeline,
    prompt: str,
    *,
    source: Image.Image | None = None,
    size: int = 32,
    steps: int = 5,
    guidance: float = 1.0,
    seed: int = 0,
    latents: torch.Tensor | None = None,
) -> Image.Image:
    """One image.

    Args:
        pipeline: see `load`.
        prompt: what to draw; with a source, the instruction.
        source: image to edit.
        size: height and width in pixels.
        steps: denoising steps, as many as the student was trained with.
        guidance: 1 is none, and what a student is made for.
        seed: of the noise.
        latents: the noise itself, packed, (1, tokens, channels); None draws it from the seed.
    """
    return pipeline(
        prompt,
        image=source,
        negative_prompt="" if guidance > 1 else None,
        true_cfg_scale=guidance,
        height=size,
        width=size,
        output_resolution=size,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        latents=latents,
    ).images[0]


def main() -> None:
    """Draw one image and write it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/student/export"), help="an exported generator")
    parser.add_argument("--prompt", required=True, help="what to draw, or with --source the instruction")
    parser.add_argument("--source", type=Path, help="image to edit")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=5, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=1.0, help="1 is none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists() and not args.overwrite:
        parser.error(f"'{args.output}' exists. Give --output another name, or add --overwrite to replace it.")
    source = None if args.source is None else ImageOps.exif_transpose(Image.open(args.source)).convert("RGB")
    image = sample(
        load(args.model),
        args.prompt,
        source=source,
        size=args.size,
        steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
    )
    image.convert("RGB").save(args.output)


if __name__ == "__main__":
    main()
