"""People close the loop: votes on the page become training data, and a reward model learns from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from torchvision.utils import save_image

from datamodules import PreferenceDataModule
from datamodules.annotation_files import AnnotationBatch, read_annotations
from datamodules.preferences import Pair, load_pairs, read_preferences
from flow_rl.evaluation.ballot import Ballot
from flow_rl.evaluation.votes_to_preferences import main
from flow_rl.evaluation.voting import build_app
from flow_rl.rewards.finetune_settings import RewardObjective
from flow_rl.rewards.reading import ReadingSettings
from tests.toy_vlm import grey, toy_data, toy_files, toy_module, toy_trainer

BATTLES, TIES = 12, 2
DIRECT = ReadingSettings(reasoning=False)


def drawn(directory: Path, level: float) -> Path:
    """Images of one model as `callbacks.ImageWriter` leaves them, all about as bright as `level`."""
    directory.mkdir()
    rows = []
    for i in range(BATTLES):
        save_image(grey(level, i), directory / f"{i}_0.png")
        rows.append({"id": i, "member": 0, "prompt": "a square", "category": "x", "task": "t2i", "file": f"{i}_0.png"})
    (directory / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return directory


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """What the command takes after somebody voted for the brighter image, and called two pairs as good."""
    models = [("dark", drawn(tmp_path / "dark", 0.2)), ("light", drawn(tmp_path / "light", 0.8))]
    votes = tmp_path / "votes.jsonl"
    light = {path.read_bytes() for path in models[1][1].glob("*.png")}
    with TestClient(build_app(Ballot(*models, votes)), base_url="http://localhost") as client:
        for battle in range(BATTLES):
            token = client.get("/").text.split('name="battle" value="')[1].split('"')[0]
            brighter = "left" if client.get(f"/image/{token}/left").content in light else "right"
            choice = "tie" if battle < TIES else brighter
            assert client.post("/vote", data={"battle": token, "vote": choice}).status_code == 200
        assert "Done" in client.get("/").text
    sides = [f"--{side}={name}={path}" for side, (name, path) in zip(("left", "right"), models, strict=True)]
    return [str(votes), *sides, "--dimension=brightness"]


def losses_before_and_after(module, data, batch) -> tuple[float, float]:
    """Loss on a batch before and after one training step."""
    module.configure_model()

    @torch.no_grad()
    def loss() -> float:
        return float(module.loss(batch, [True] * len(batch))[0])

    before = loss()
    toy_trainer(1).fit(module, data)
    return before, loss()


def test_votes_on_the_page_train_a_pairwise_model(tmp_path, options, capsys) -> None:
    path = tmp_path / "preferences.jsonl"
    main([*options, f"--output={path}"])
    assert f"Left out: {TIES} pairs as ties" in capsys.readouterr().out
    pairs = read_preferences(path)
    assert len(pairs) == BATTLES - TIES
    assert {(p.chosen.image.parent.name, p.rejected.image.parent.name) for p in pairs} == {("light", "dark")}
    data = PreferenceDataModule([], [toy_files()["validation"]], preference_files=[str(path)], batch_size=8)
    module = toy_module(objective=RewardObjective(kind="pairwise", direct_share=1.0), reading=DIRECT)
    before, after = losses_before_and_after(module, data, load_pairs(pairs))
    assert after < before


def test_votes_on_the_page_train_a_pointwise_model(tmp_path, options) -> None:
    path = tmp_path / "scores.jsonl"
    main([*options, f"--output={path}", "--scores"])
    scored = read_annotations(path)
    assert sorted(round(a.score, 3) for a in scored) == [2.333] * 10 + [3.0] * 4 + [3.667] * 10
    assert {a.image.parent.name for a in scored if a.score > 3} == {"light"}
    data = toy_data(train_files=[str(path)])
    module = toy_module(objective=RewardObjective(direct_share=1.0), reading=DIRECT)
    batch = AnnotationBatch(examples=tuple(a.load() for a in scored))
    before, after = losses_before_and_after(module, data, batch)
    assert after < before


def test_scores_without_reasoning_mix_with_reasoned_annotations(tmp_path, options) -> None:
    path = tmp_path / "scores.jsonl"
    main([*options, f"--output={path}", "--scores"])
    mixed = toy_data(train_files=[toy_files()["train"], str(path)])
    module = toy_module(objective=RewardObjective(direct_share=0.3))
    module.configure_model()
    toy_trainer(1).fit(module, mixed)  # not refused
    batch = AnnotationBatch(examples=tuple(a.load() for a in read_annotations(path)[:6]))
    with torch.no_grad():
        asked, direct = (float(module.loss(batch, [share] * 6)[0]) for share in (False, True))
    assert asked == direct  # an answer without a reasoning is a direct one, never an empty reasoning
    with pytest.raises(ValueError, match="can only be trained as direct answers"):
        toy_trainer(1).fit(toy_module(), mixed)
    with pytest.raises(ValueError, match="No training example has a reasoning"):
        toy_trainer(1).fit(toy_module(objective=RewardObjective(direct_share=0.3)), toy_data(train_files=[str(path)]))


def test_preferences_mix_with_pairs_of_reasoned_annotations(tmp_path, options) -> None:
    path = tmp_path / "preferences.jsonl"
    main([*options, f"--output={path}"])
    data = PreferenceDataModule(
        [toy_files()["train"]], [toy_files()["validation"]], preference_files=[str(path)], batch_size=8
    )
    assert len(data.source) == 50 + BATTLES - TIES
    module = toy_module(objective=RewardObjective(kind="pairwise", direct_share=0.3))
    toy_trainer(1).fit(module, data)


def test_both_images_of_a_pair_get_one_kind_of_answer(tmp_path, options) -> None:
    path = tmp_path / "scores.jsonl"
    main([*options, f"--output={path}", "--scores"])
    reasoned, bare = read_annotations(toy_files()["train"])[0], read_annotations(path)[0]
    module = toy_module(objective=RewardObjective(kind="pairwise", direct_share=0.5))
    module.configure_model()
    for pair in (Pair(reasoned, bare), Pair(bare, reasoned)):
        with torch.no_grad():
            asked, direct = (float(module.loss(load_pairs([pair]), [share])[0]) for share in (False, True))
        assert asked == direct
    with torch.no_grad():
        pair = load_pairs([Pair(reasoned, reasoned)])
        assert float(module.loss(pair, [False])[0]) != float(module.loss(pair, [True])[0])
