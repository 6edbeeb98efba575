"""Annotation and preference files: what is read, in which order, and which line a complaint names."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from datamodules import AnnotationDataModule, PreferenceDataModule
from datamodules.annotation_files import Annotation, read_annotations
from datamodules.annotations import AnnotationStream, FixedAnnotations
from datamodules.preferences import PairSource, PreferenceStream, read_preferences

ROW = {"id": 0, "image": "a.png", "prompt": "a cat", "dimension": "alignment", "score": 3, "reasoning": "a dog"}


@pytest.fixture
def directory(tmp_path) -> Path:
    for name, level in (("a", 0), ("b", 128), ("c", 255)):
        Image.new("RGB", (4, 4), (level, level, level)).save(tmp_path / f"{name}.png")
    return tmp_path


def write(path: Path, rows: list) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def many(directory: Path, count: int = 20, name: str = "many", **changes) -> str:
    rows = [ROW | {"id": f"{name}-{i}", "score": 1 + i % 5, "prompt": f"p{i % 4}"} | changes for i in range(count)]
    return write(directory / f"{name}.jsonl", rows)


def test_fields_are_read_and_paths_are_relative_to_the_file(directory) -> None:
    rows = [ROW, ROW | {"id": "x", "score": 2.5, "source": "b.png", "group": 7, "reasoning": " because \n"}]
    plain, edit = read_annotations(write(directory / "rows.jsonl", rows))
    assert (plain.id, plain.score, plain.source, plain.group) == (0, 3.0, None, None)
    assert (edit.id, edit.score, edit.group, edit.reasoning) == ("x", 2.5, 7, "because")
    loaded = edit.load()
    assert loaded.image.shape == loaded.source.shape == (3, 4, 4)
    assert (int(loaded.image[0, 0, 0]), int(loaded.source[0, 0, 0])) == (0, 128)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ROW | {"score": 6}, "'score' is 6; scores lie on the scale 1..5"),
        (ROW | {"score": True}, "'score' must be float"),
        (ROW | {"image": "d.png"}, "image 'd.png' is not there"),
        (ROW | {"source": "d.png"}, "source 'd.png' is not there"),
        (ROW | {"reasoning": "good\nScore: 4"}, "a line 'Score: ...' of its own"),
        (ROW | {"reason": "x"}, "unknown key 'reason'. Did you mean 'reasoning'"),
        ("{", "not JSON"),
    ],
)
def test_bad_line_is_named(directory, bad, message: str) -> None:
    path = write(directory / "rows.jsonl", [ROW | {"id": 1}, bad])
    with pytest.raises(ValueError) as caught:
        read_annotations(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)


def test_files_and_dimensions_are_mixed_and_filtered(directory) -> None:
    files = [many(directory), many(directory, 5, "others", dimension="aesthetic")]
    data = AnnotationDataModule(files, files, batch_size=4)
    assert data.dimensions == ["aesthetic", "alignment"]
    assert len(data.train) == 25
    assert AnnotationDataModule(files, files, dimensions=["aesthetic"], batch_size=4).dimensions == ["aesthetic"]
    spread = AnnotationDataModule(files, files, batch_size=4, max_validation=5).validation
    assert [a.dimension for a in spread] == ["alignment"] * 4 + ["aesthetic"]
    with pytest.raises(ValueError, match=r"names 'portrait', but data\.train_files has aesthetic, alignment"):
        AnnotationDataModule(files, files, dimensions=["portrait"], batch_size=4)


def ids(batch) -> list:
    return [e.annotation.id for e in batch.examples]


def test_order_is_resumable_and_the_same_for_any_number_of_ranks(directory) -> None:
    annotations = read_annotations(many(directory))

    def take(count: int, **changes) -> list[list]:
        stream = iter(AnnotationStream(annotations, batch_size=4, seed=3, **changes))
        return [ids(next(stream)) for _ in range(count)]

    whole = take(10)
    assert take(4, start=6) == whole[6:]
    ranks = [take(10, rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole
    assert Counter(i for batch in whole[:5] for i in batch) == Counter(a.id for a in annotations)
    assert whole[:5] != whole[5:]


def test_fixed_annotations_reach_every_rank_once(directory) -> None:
    annotations = read_annotations(many(directory, 11))
    parts = [FixedAnnotations(annotations, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    assert [len(p) for p in parts] == [2, 2]
    found = Counter(i for p in parts for batch in p for i in ids(batch))
    assert found == Counter(a.id for a in annotations)


def annotation(number: int, score: float, **changes) -> Annotation:
    values = {"id": number, "dimension": "d", "prompt": "p", "image": Path("x"), "score": score, "reasoning": "r"}
    return Annotation(**(values | changes))


@pytest.mark.parametrize(
    "scores", [[1, 2, 3, 4, 5, 5], [3] * 7 + [1], [1, 1, 1, 2, 2], [4, 4, 4], [2, 5, 2, 5, 2, 5, 2]]
)
def test_derived_pairs_are_as_many_as_can_be_and_use_no_image_twice(scores: list[int]) -> None:
    annotations = [annotation(i, float(s)) for i, s in enumerate(scores)]
    source = PairSource([], annotations, match="dimension", seed=0)
    commonest = max(Counter(scores).values())
    assert len(source) == min(len(scores) // 2, len(scores) - commonest)
    for epoch in range(4):
        found = source.epoch(epoch)
        assert len(found) == len(source)
        assert all(p.chosen.score > p.rejected.score for p in found)
        used = [a.id for p in found for a in p]
        assert len(used) == len(set(used))


def test_pairs_match_and_change_from_epoch_to_epoch() -> None:
    annotations = [
        annotation(i, 1.0 + i % 5, dimension="de"[i % 2], prompt=f"p{i % 3}", group=i // 10) for i in range(60)
    ]
    for match in ("dimension", "prompt", "group"):
        found = PairSource([], annotations, match=match, seed=0).epoch(0)
        assert found
        assert all(p.chosen.dimension == p.rejected.dimension for p in found)
        assert all(getattr(p.chosen, match) == getattr(p.rejected, match) for p in found)
    source = PairSource([], annotations, match="dimension", seed=0)
    assert set(source.epoch(0)) != set(source.epoch(1))
    assert source.epoch(1) == PairSource([], annotations, match="dimension", seed=0).epoch(1)


def test_preference_stream_is_resumable_and_shared_by_ranks(directory) -> None:
    source = PairSource([], read_annotations(many(directory)), match="dimension", seed=0)

    def take(count: int, **changes) -> list[list]:
        stream = iter(PreferenceStream(source, batch_size=2, **changes))
        batches = [next(stream) for _ in range(count)]
        return [
            [(c.annotation.id, r.annotation.id) for c, r in zip(b.chosen, b.rejected, strict=True)] for b in batches
        ]

    whole = take(12)
    assert take(5, start=7) == whole[7:]
    ranks = [take(12, rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole


def test_preference_files_are_read_and_mixed_in(directory) -> None:
    row = {
        "id": 1,
        "prompt": "a cat",
        "chosen": "a.png",
        "rejected": "b.png",
        "dimension": "aesthetic",
        "source": "c.png",
    }
    path = write(directory / "pairs.jsonl", [row])
    pair = read_preferences(path)[0]
    assert (pair.chosen.image.name, pair.rejected.image.name, pair.chosen.source.name) == ("a.png", "b.png", "c.png")
    scored = many(directory)
    data = PreferenceDataModule([scored], [scored], preference_files=[path], batch_size=4)
    assert len(data.source) == 10 + 1
    assert data.dimensions == ["aesthetic", "alignment"]
    assert not data.has_reasoning
    alone = PreferenceDataModule([], [scored], preference_files=[path], batch_size=2)
    assert len(alone.source) == 1
    for bad, message in (
        ({"rejected": "a.png"}, "are the same image"),
        ({"rejected": "d.png"}, "rejected 'd.png' is not there"),
    ):
        with pytest.raises(ValueError, match=f"line 1: .*{message}"):
            read_preferences(write(directory / "bad.jsonl", [row | bad]))


def test_impossible_batches_are_refused(directory) -> None:
    scored = many(directory)
    with pytest.raises(ValueError, match="even number of images"):
        PreferenceDataModule([scored], [scored], batch_size=5)
    with pytest.raises(ValueError, match="takes 20 pairs, but there are 10"):
        PreferenceDataModule([scored], [scored], batch_size=40)
    with pytest.raises(ValueError, match="have 20 images"):
        AnnotationDataModule([scored], [scored], batch_size=21)
    with pytest.raises(ValueError, match=r"data\.match is 'group'"):
        PreferenceDataModule([scored], [scored], match="group", batch_size=4)
    with pytest.raises(ValueError, match="make it a multiple of 3"):
        AnnotationStream(read_annotations(scored), batch_size=4, seed=0, world_size=3)
