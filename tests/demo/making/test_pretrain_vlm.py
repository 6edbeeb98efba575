from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from demo.making import pretrain_vlm, vlm_tasks
from demo.making.pretrain_vlm import answer_loss, language_batch, measure, train
from demo.making.vlm_pool import Pool, load_pool, loose_card
from demo.making.vlm_seeing import IGNORED, SLOTS, WORDS, targets, teach_seeing, word_tokens
from demo.making.vlm_tasks import TASKS, corpus, description, task_batch
from demo.world.font import GLYPHS
from demo.world.render import draw_options
from demo.world.vocabulary import CATEGORIES
from demo.world.world import Scene, keyed_rng, make_scene, render, split_of
from flow_rl.models.tiny.vision_language import build_vlm, build_vlm_tokenizer
from flow_rl.rewards.rubrics import Rubric


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return load_pool(1, 24, 4, split="train", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def built() -> tuple:
    return build_vlm(build_vlm_tokenizer(corpus(1, 150)), hidden_size=64, num_layers=1)


def test_a_pool_is_the_same_from_its_cache(pool: Pool, tmp_path: Path) -> None:
    first, second = (load_pool(1, 24, 4, split="train", cache_dir=tmp_path) for _ in range(2))
    for other in (first, second):
        assert (other.images == pool.images).all()
        assert other.scenes == pool.scenes
        assert all((a.result == b.result).all() for a, b in zip(other.edits, pool.edits, strict=True))
    assert len(pool.scenes) == 32
    assert {split_of(s.category, s.attributes) for s in pool.scenes} == {"train"}


@pytest.mark.parametrize("text", ["D", "DU", "KTP", "ABCD"])
def test_loose_cards_show_every_letter_whole(text: str) -> None:
    attributes = {"card": "white", "ink": "black", "text": text}
    scene = Scene(
        category="typography", attributes=attributes, options=draw_options("typography", attributes, keyed_rng(1))
    )
    usual, strokes = render(scene), [int(GLYPHS[letter].sum()) for letter in text]
    sizes = {sum(n * s**2 for n, s in zip(strokes, scales, strict=False)) for scales in ((2, 3), (3, 2))}
    drawn = [loose_card(scene, keyed_rng(2, i)) for i in range(12)]
    for card in drawn:
        assert {tuple(c) for c in card.reshape(-1, 3)} == {tuple(c) for c in usual.reshape(-1, 3)}
        assert len(text) > 2 or int((card.mean(-1) < 128).sum()) in sizes
    if len(text) > 2:
        assert all((card == usual).all() for card in drawn)
    else:
        assert len({card.tobytes() for card in drawn}) > 6


@pytest.mark.parametrize("name", TASKS)
def test_batches_are_a_function_of_seed_and_step(name: str, pool: Pool) -> None:
    first, again, other = (task_batch(name, pool, 0, step, count=4) for step in (5, 5, 6))
    assert [e.answer for e in first] == [e.answer for e in again]
    assert all(torch.equal(a.question.image, b.question.image) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a.question.image, b.question.image) for a, b in zip(first, other, strict=True))
    assert not any("Score" in e.answer for e in first)


def test_every_word_is_one_token(built: tuple, pool: Pool) -> None:
    tokenizer = built[1].tokenizer
    texts = [e.answer for name in TASKS for e in task_batch(name, pool, 0, 0)]
    texts += [Rubric.load(p).system_text for p in sorted(vlm_tasks.RUBRICS.glob("*.yaml"))]
    for text in texts:
        words = "".join(c if c.isalnum() else " " for c in text).split()
        for word in [w for w in words[1:] if not w.isdigit()]:  # a digit is always a token apart
            assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1, word
    assert len(set(word_tokens(built[1]))) == len(WORDS)
    with pytest.raises(ValueError, match="The tokenizer splits"):
        word_tokens(build_vlm(build_vlm_tokenizer(["Score: 1"]), hidden_size=64, num_layers=1)[1])


def test_labels_are_the_answer_and_nothing_else(built: tuple, pool: Pool) -> None:
    tokenizer = built[1].tokenizer
    for name in TASKS:
        examples = task_batch(name, pool, 0, 0, count=3)
        inputs, labels = language_batch(built[1], examples)
        for row, example in zip(labels, examples, strict=True):
            assert tokenizer.decode(row[row != IGNORED]) == example.answer + "<|im_end|>"
        # The label at a position is the token fed at the next one.
        fed = inputs["input_ids"][:, -labels.shape[1] + 1 :]
        known = labels[:, :-1] != IGNORED
        assert torch.equal(labels[:, :-1][known], fed[known])


def test_slots_hold_the_scenes_words() -> None:
    scene = Scene(category="typography", attributes={"card": "pink", "ink": "red", "text": "KT"}, options={})
    row = targets([scene])[0]
    found = {slot: WORDS[i] for slot, i in zip(SLOTS, row.tolist(), strict=True) if i != IGNORED}
    assert found == {
        ("", "category"): "typography",
        ("typography", "card"): "pink",
        ("typography", "ink"): "red",
        ("typography", "letter 0"): "K",
        ("typography", "letter 1"): "T",
        ("typography", "letter 2"): "none",
        ("typography", "letter 3"): "none",
    }
    for category in CATEGORIES[:-1]:
        scene = make_scene(0, 0, split="train", category=category)
        known = (targets([scene])[0] != IGNORED).sum().item()
        assert known == 1 + len([name for name, _ in SLOTS if name == category])
        assert description(scene).count(",") == known - 1


def test_seeing_and_answering_are_learnt(pool: Pool, built: tuple) -> None:
    model, processor = build_vlm(built[1].tokenizer, hidden_size=64, num_layers=1)
    few = replace(pool, scenes=pool.scenes[:8], images=pool.images[:8])
    wanted = targets(few.scenes)
    columns = [column[column != IGNORED] for column in wanted.T]
    guessed = sum((column == column.mode().values).sum().item() for column in columns if len(column))
    found = teach_seeing(model, processor, few, few, steps=40, batch=16, lr=4e-3, seed=0)
    assert found > guessed / (wanted != IGNORED).sum().item() + 0.15  # more than each slot's commonest word
    examples = task_batch("damage", pool, 0, 0, count=8)
    before, *_ = answer_loss(model, processor, examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        answer_loss(model, processor, examples)[0].backward()
        optimizer.step()
    after, *_ = answer_loss(model, processor, examples)
    assert after < before / 2
    assert set(measure(model, processor, pool)) == set(TASKS)


def test_an_interrupted_run_ends_where_it_would_have(
    pool: Pool, built: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_vlm, "measure", lambda *_: {})
    monkeypatch.setattr(vlm_tasks, "TASKS", {name: (make, 2) for name, (make, _) in TASKS.items()})
    keep = pretrain_vlm._keep

    def keep_both(path: Path, step: int, *args, **kwargs) -> None:
        keep(path, step, *args, **kwargs)
        shutil.copy(path, tmp_path / f"step-{step}.pt")

    monkeypatch.setattr(pretrain_vlm, "_keep", keep_both)
    settings = {"steps": 4, "lr": 1e-3, "seed": 0, "every": 2}
    whole, resumed = (build_vlm(built[1].tokenizer, hidden_size=64, num_layers=1)[0] for _ in range(2))
    train(whole, built[1], pool, pool, checkpoint=tmp_path / "a.pt", **settings)
    train(resumed, built[1], pool, pool, checkpoint=tmp_path / "step-2.pt", **settings)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="belongs to a run of 4 steps, not 6"):
        train(whole, built[1], pool, pool, checkpoint=tmp_path / "a.pt", **(settings | {"steps": 6}))
