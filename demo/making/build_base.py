"""Assemble the untrained generator: `python -m demo.making.build_base --vae runs/vae --output runs/scratch`.

A tokenizer trained on the world's captions and instructions, the trained VAE, and a text encoder and a transformer
with random weights, in the diffusers layout. `train.py fit --config configs/demo/pretrain.yaml` takes it from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers import AutoencoderKLQwenImage21

from demo.making.outputs import check_output
from demo.world.captions import caption
from demo.world.edits import make_edit
from demo.world.world import make_scene
from flow_rl.files import replacing
from flow_rl.models.tiny.qwen_image_21 import build_pipeline


def corpus(seed: int, count: int) -> list[str]:
    """`count` captions and `count` instructions of the training split."""
    captions = [caption(make_scene(seed, i, split="train"), seed, i) for i in range(count)]
    return captions + [make_edit(seed, i, split="train").instruction for i in range(count)]


def main() -> None:
    """Parse the command line, assemble, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="directory that demo.making.pretrain_vae wrote")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--texts", type=int, default=3000, help="captions, and as many instructions, for the tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check_output(parser, args.output)
    pipeline = build_pipeline(corpus(args.seed, args.texts), seed=args.seed)
    pipeline.register_modules(vae=AutoencoderKLQwenImage21.from_pretrained(args.vae))
    with replacing(args.output) as partial:
        pipeline.save_pretrained(partial)
    parameters = {
        name: sum(p.numel() for p in getattr(pipeline, name).parameters())
        for name in ("transformer", "text_encoder", "vae")
    }
    print(", ".join(f"{name} {count / 1e6:.2f} M parameters" for name, count in parameters.items()))


if __name__ == "__main__":
    main()
