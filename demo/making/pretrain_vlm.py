"""Pre-train the tiny vision-language model: `python -m demo.making.pretrain_vlm --output runs/vlm`.

First the vision tower alone (`demo.making.vlm_seeing`), then the whole model on the questions of
`demo.making.vlm_tasks` by next-token loss on the answers. The output is a directory that plain transformers loads.
Progress is kept in `checkpoint.pt` beside it: the same command goes on from there, and ends where an uninterrupted run
would.

Shapes: N examples, L tokens of the longest, A tokens of the longest answer, V vocabulary.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from demo.making.outputs import check_output
from demo.making.vlm_pool import Pool, load_pool
from demo.making.vlm_seeing import build_reader, seeing_loss, targets, teach_seeing
from demo.making.vlm_tasks import TASKS, Example, corpus, task_batch
from demo.world.world import keyed_rng
from flow_rl.files import replacing, replacing_file
from flow_rl.models.tiny.vision_language import build_vlm, build_vlm_tokenizer
from flow_rl.rewards.conversation import IGNORED, encode_questions, pad_left

#: seeds of pre-training's scenes are far from those of annotations, prompts and verifiers
POOL_SEED, HELD_OUT_SEED = 7000, 7500
HELD_OUT = 64
_SEEING_STREAM = 41
#: pictures a step whose attributes are read off the image tokens: seeing goes on being taught, for a tenth of the time
_SEEN = 32
_SEEING_WEIGHT = 0.25


def language_batch(processor: Qwen3VLProcessor, examples: Sequence[Example]) -> tuple[dict[str, Any], Tensor]:
    """Examples as the model reads them.

    Args:
        processor: of the model.
        examples: N of them.

    Returns:
        the model's inputs, padded on the left, and next-token labels of their last A positions, int64 (N, A),
        `IGNORED` where there is no answer.
    """
    tokenizer = processor.tokenizer
    encoded = encode_questions(processor, [e.question for e in examples])
    turns = [[*tokenizer.encode(e.answer, add_special_tokens=False), tokenizer.eos_token_id] for e in examples]
    longest = max(map(len, turns))
    rows = [ids + turn[:-1] for ids, turn in zip(encoded.input_ids, turns, strict=True)]
    inputs = pad_left(rows, pad_id=tokenizer.pad_token_id, image_token_id=processor.image_token_id)
    labels = torch.tensor([[IGNORED] * (longest - len(turn)) + turn for turn in turns])
    return inputs | encoded.images | {"logits_to_keep": longest}, labels


def answer_loss(
    model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, examples: Sequence[Example]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean next-token loss of the answers, with logits (N, A, V) and labels (N, A)."""
    inputs, labels = language_batch(processor, examples)
    logits = model(**inputs).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    return loss, logits, labels


@torch.no_grad()
def measure(
    model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, pool: Pool
) -> dict[str, tuple[float, float]]:
    """Held-out accuracy by task.

    Returns:
        share of right answer parts (between commas: one attribute each) and of answers that are right throughout.
        Read with the true answer so far given; an answer is right throughout exactly if greedy decoding gives it.
    """
    comma = processor.tokenizer.encode(",", add_special_tokens=False)[0]
    was, found = model.training, {}
    model.eval()
    for name in TASKS:
        _, logits, labels = answer_loss(model, processor, task_batch(name, pool, HELD_OUT_SEED, 0, count=HELD_OUT))
        parts, whole = [], []
        for right, row in zip((logits.argmax(-1) == labels).tolist(), labels.tolist(), strict=True):
            current = [True]
            for ok, label in zip(right, row, strict=True):
                if label == IGNORED:
                    continue
                current[-1] &= ok
                if label == comma:
                    current.append(True)
            parts += current
            whole.append(all(current))
        found[name] = (sum(parts) / len(parts), sum(whole) / len(whole))
    model.train(was)
    return found


def train(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    pool: Pool,
    held_out: Pool,
    *,
    steps: int,
    lr: float,
    seed: int,
    checkpoint: Path,
    every: int,
) -> None:
    """Train on every task at every step, one backward pass a task, so that none is padded to another's length.

    Args:
        model: trained in place.
        processor: of the model.
        pool: to train on.
        held_out: to measure on.
        steps: optimizer steps in all.
        lr: peak learning rate.
        seed: of the batches.
        checkpoint: file to go on from, if it is there, and to keep progress in.
        every: steps between measurements and checkpoints.
    """
    reader, wanted_N = build_reader(model, processor, seed), targets(pool.scenes)
    # The reader shares the word embeddings, and says so: each parameter is listed once.
    parameters = list(dict.fromkeys([*model.parameters(), *reader.parameters()]))
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["steps"] != steps:
            raise ValueError(f"'{checkpoint}' belongs to a run of {state['steps']} steps, not {steps}: remove it.")
        first = state["step"]
        model.load_state_dict(state["model"])
        if "optimizer" in state:
            reader.load_state_dict(state["reader"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
    start = time.perf_counter()
    model.train()
    for step in range(first, steps):
        losses = {}
        for name in TASKS:
            loss, _, _ = answer_loss(model, processor, task_batch(name, pool, seed, step))
            (loss / len(TASKS)).backward()
            losses[name] = loss.item()
        rng = keyed_rng(seed, step, _SEEING_STREAM)
        loss, losses["seen"] = seeing_loss(model, processor, reader, pool, wanted_N, rng, _SEEN)
        (_SEEING_WEIGHT * loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 19:
            _report(step + 1, steps, losses, (time.perf_counter() - start) / (step + 1 - first))
        if step % every == every - 1 or step == steps - 1:
            for name, (part, whole) in measure(model, processor, held_out).items():
                print(f"  held-out {name:9s} parts {part:.3f}  whole answers {whole:.3f}", flush=True)
            _keep(checkpoint, step + 1, steps, model, reader=reader, optimizer=optimizer, schedule=schedule)
    model.eval()


def _report(step: int, steps: int, losses: dict[str, float], seconds: float) -> None:
    shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    left = seconds * (steps - step) / 60
    print(f"step {step:5d}/{steps}  {shown}  {1 / seconds:.2f} steps/s, {left:.0f} min left", flush=True)


def _keep(path: Path, step: int, steps: int, model: torch.nn.Module, **states: Any) -> None:
    state = {"step": step, "steps": steps, "model": model.state_dict()}
    state |= {name: part.state_dict() for name, part in states.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as partial:
        torch.save(state, partial)


def main() -> None:
    """Parse the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--init", type=Path, default=None, help="a model of this command to go on from, in its layout")
    parser.add_argument("--scenes", type=int, default=12000, help="renders of the training split, besides cards")
    parser.add_argument("--edits", type=int, default=2500, help="edits of the training split, three results each")
    parser.add_argument(
        "--seeing-steps", type=int, default=None, help="of the vision tower alone; 1200, and 0 with --init, if omitted"
    )
    parser.add_argument("--seeing-batch", type=int, default=48)
    parser.add_argument("--seeing-lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=3000, help="of the whole model")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--every", type=int, default=200, help="steps between measurements and checkpoints")
    parser.add_argument("--threads", type=int, default=None, help="of torch; None leaves its own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="keeps the renders")
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    args = parser.parse_args()
    check_output(parser, args.output / "model")
    torch.set_flush_denormal(True)  # before the first parallel region: denormals made a step 100x slower
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.cache.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    common = {"cache_dir": args.cache, "workers": args.workers}
    pool = load_pool(POOL_SEED + args.seed, args.scenes, args.edits, split="train", loose_cards=True, **common)
    held_out = load_pool(HELD_OUT_SEED, 300, 60, split="validation", **common)
    print(f"{len(pool.scenes)} renders, {len(pool.edits)} edits, {time.perf_counter() - start:.0f} s", flush=True)
    if args.init is None:
        model, processor = build_vlm(build_vlm_tokenizer(corpus(POOL_SEED, 2000)), seed=args.seed)
    else:
        model = Qwen3VLForConditionalGeneration.from_pretrained(args.init)
        processor = Qwen3VLProcessor.from_pretrained(args.init)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(processor.tokenizer)} tokens")
    checkpoint = args.output / "checkpoint.pt"
    if args.seeing_steps is None:
        args.seeing_steps = 1200 if args.init is None else 0
    if not checkpoint.exists() and args.seeing_steps:
        settings = {"steps": args.seeing_steps, "batch": args.seeing_batch, "lr": args.seeing_lr, "seed": args.seed}
        teach_seeing(model, processor, pool, held_out, **settings)
        _keep(checkpoint, 0, args.steps, model)
    train(
        model,
        processor,
        pool,
        held_out,
        steps=args.steps,
        lr=args.lr,
        seed=args.seed,
        checkpoint=checkpoint,
        every=args.every,
    )
    with replacing(args.output / "model") as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    print(f"written to {args.output / 'model'}, {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
