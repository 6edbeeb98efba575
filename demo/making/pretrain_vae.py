"""Train the toy VAE on renders: `python -m demo.making.pretrain_vae --output runs/vae`.

Loss: absolute error of the pixels plus a small KL term; at the end the latents' mean and deviation go into the
config, as the released VAE carries them, so that the generator sees unit-scale latents.

Shapes: N images, C latent channels.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage21
from torch import Tensor
from torch.nn import functional

from demo.making.outputs import check_output
from demo.world.dataset import render_scenes
from flow_rl.files import replacing
from flow_rl.models.images import from_uint8, to_rgba
from flow_rl.models.tiny.qwen_image_21 import build_vae

#: weight of the KL term; small, as a latent is normalised afterwards anyway
KL_WEIGHT = 1e-5
#: renders held out for the printed error
HELD_OUT = 500


def train(vae: AutoencoderKLQwenImage21, images: Tensor, *, steps: int, batch: int, lr: float, seed: int) -> None:
    """Fit the VAE, printing the error every 50 steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    start = time.perf_counter()
    vae.train()
    for step in range(steps):
        x = to_rgba(images[torch.randint(len(images), (batch,), generator=generator)])
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        # The decoder clamps to [-1, 1], where the gradient dies; a fresh network stays well inside.
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        error = functional.l1_loss(y, x) + functional.mse_loss(y, x)
        loss = error + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            spent = time.perf_counter() - start
            left = spent / (step + 1) * (steps - step - 1)
            print(f"step {step:5d}/{steps}  error {error.item():.4f}  {spent:.0f} s, {left:.0f} s left", flush=True)
    vae.eval()


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLQwenImage21, images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation of each latent channel over images (N, 3, H, W)."""
    latents = torch.cat([vae.encode(to_rgba(part)).latent_dist.mode() for part in images.split(128)])
    by_channel = latents.transpose(0, 1).flatten(1)
    return by_channel.mean(1).tolist(), by_channel.std(1).tolist()


def main() -> None:
    """Parse the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--start", type=Path, default=None, help="go on from this directory's weights")
    parser.add_argument("--scenes", type=int, default=12000, help="renders of the training split")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="keeps the renders")
    args = parser.parse_args()
    check_output(parser, args.output)
    torch.set_flush_denormal(True)  # before the first parallel region: denormals made a step 100x slower
    data = render_scenes(args.seed, range(args.scenes), "train", workers=2, cache_dir=args.cache)
    images = from_uint8(data.images)
    torch.manual_seed(args.seed)
    vae = build_vae() if args.start is None else AutoencoderKLQwenImage21.from_pretrained(args.start)
    vae = vae.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    train(vae, images[:-HELD_OUT], steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed)
    mean, std = latent_statistics(vae, images[:2000])
    vae.register_to_config(latents_mean=mean, latents_std=std)
    with torch.no_grad():
        held_out = images[-HELD_OUT:]
        made = vae(to_rgba(held_out)).sample[:, :3, 0] / 2 + 0.5
    mse = (made - held_out).square().mean().item()
    print(f"held-out renders: PSNR {-10 * np.log10(mse):.1f} dB")
    with replacing(args.output) as partial:
        vae.save_pretrained(partial)


if __name__ == "__main__":
    main()
