"""What the data and the generator must agree on: counted over all prompts, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from datamodules import PromptDataModule
from datamodules.faults import SHOWN
from flow_rl.messages import warn_on_first_rank
from flow_rl.models.loading import FAMILIES, check_model_path, config_directory
from flow_rl.models.prompt_tokens import DEFAULT_LIMIT, load_tokenizer, too_long
from flow_rl.planning.setup import Setup


def prompts_fit_generator(setup: Setup) -> Iterator[str]:
    """The complaint about every prompt that the generator would read a part of, or that is longer than allowed."""
    generator = setup.profile.generator
    parts = {task: part for task, part in setup.tasks.items() if isinstance(part, PromptDataModule)}
    if generator is None or not parts:
        return
    pipeline = check_model_path(generator.model_path)
    most = FAMILIES[pipeline].prompt_limit(pipeline)
    limit = generator.max_prompt_tokens or most or DEFAULT_LIMIT
    if most is not None and limit > most:
        yield (
            f"model.max_prompt_tokens is {limit}, and a {pipeline} reads {most} tokens of a prompt whatever is set: "
            "lower it, or leave it out."
        )
        limit = most
    raise_it = "" if limit == most else f", or raise model.max_prompt_tokens ({limit})"
    found = [fault for part in parts.values() for fault in _of_part(part, limit, generator.model_path, raise_it)]
    yield from found[:SHOWN]
    if len(found) > SHOWN:
        yield f"... and {len(found) - SHOWN} more prompts that are too long."


def _of_part(part: PromptDataModule, limit: int, model_path: str, raise_it: str) -> Iterator[str]:
    tokenizers: list[object] = []

    def tokenizer() -> object:
        if not tokenizers:
            tokenizers.append(load_tokenizer(config_directory(model_path)))
        if tokenizers[0] is None:
            raise LookupError
        return tokenizers[0]

    for name, split in part.splits.items():
        ids = getattr(part, name).ids  # the prompts in use: a setting may leave out some of the file
        try:
            counts = too_long([split.texts[i] for i in ids], limit, tokenizer)
        except LookupError:
            warn_on_first_rank(
                f"'{split.path}' has prompts that may be longer than the {limit} tokens that are allowed. The "
                f"tokenizer of '{model_path}' is not on this machine, so they are counted when they are encoded, and a "
                "prompt that is too long ends the run then. `hf download` the model first."
            )
            continue
        for row, count in counts.items():
            yield (
                f"{split.path}, line {split.lines[ids[row]]}: the prompt with id {ids[row]} has {count} tokens, and "
                f"the generator '{model_path}' takes {limit}. Shorten it{raise_it}."
            )
