"""Bad data files: what is given, and words that the one message must hold. All are found as the file is read."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules import AnnotationDataModule, EditPairDataModule, PromptDataModule
from datamodules.annotation_files import read_annotations
from datamodules.edit_pairs import read_edits
from datamodules.faults import SHOWN, DataError
from datamodules.preferences import read_preferences
from datamodules.prompts import read_prompts
from flow_rl.names import RESERVED

GOOD = {"id": 1, "prompt": "a red pot", "category": "plant"}
NEXT = GOOD | {"id": 2, "prompt": "a blue pot"}


def lines(*rows: object) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def change(**fields: object) -> bytes:
    """A good row, then one that differs in these fields."""
    return lines(GOOD, NEXT | fields)


TEXT = lines(GOOD, NEXT).decode()

#: content of a prompt file, and what the message must say beside the file's name
PROMPT_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty: expected one JSON object a line with the keys id, prompt, category"),
    "blank lines alone": (b"\n \r\n\n", "is empty"),
    "a mark alone": (codecs.BOM_UTF8, "is empty"),
    "UTF-16 with a mark": (TEXT.encode("utf-16"), "it is UTF-16 text.*iconv -f UTF-16"),
    "UTF-16 without one": (TEXT.encode("utf-16-le"), "it is UTF-16LE text or binary"),
    "UTF-16, big end first": (TEXT.encode("utf-16-be"), "it is UTF-16BE text or binary"),
    "UTF-32": (TEXT.encode("utf-32"), "it is UTF-32 text"),
    "Latin-1": ('{"id": 1, "prompt": "Käfer", "category": "x"}'.encode("latin-1"), "line 1: not UTF-8.*'Käfer'|Käfer"),
    "one line of Latin-1": (lines(GOOD) + "ä\n".encode("latin-1"), r"line 2: not UTF-8 \(byte 0xE4 at position 1\)"),
    "UTF-8 cut in a character": (lines(GOOD) + "ä".encode()[:1], "line 2: not UTF-8"),
    "gzip": (gzip.compress(TEXT.encode()), "gzip-compressed data: decompress it"),
    "zip": (b"PK\x03\x04" + bytes(30), "a ZIP archive: unpack it"),
    "xz": (b"\xfd7zXZ\x00\x00\x04", "xz-compressed data"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "Zstandard-compressed data"),
    "parquet": (b"PAR1\x15\x04", "a Parquet table: export its rows"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer.*git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "an HTML page, as a failed download leaves"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "it is a PNG picture"),
    "zeros": (bytes(100), "zeros alone, as an interrupted copy leaves"),
    "one JSON array": (json.dumps([GOOD, NEXT]).encode(), r"one JSON array; expected one JSON object a line.*jq -c"),
    "an array over lines": (json.dumps([GOOD, NEXT], indent=1).encode(), "one JSON array"),
    "an object over lines": (json.dumps(GOOD, indent=1).encode(), r"JSON objects over several lines.*jq -c \."),
    "a table": (b"id,prompt,category\n1,a pot,plant\n", "a table with columns such as"),
    "a table of tabs": (b"id\tprompt\tcategory\n1\ta pot\tplant\n", "a table with columns"),
    "not JSON": (lines(GOOD, "{'id': 2}"), "line 2: not JSON"),
    "cut off": (lines(GOOD) + b'{"id": 2, "prompt": "x", "cat', r"line 2: not JSON \(Unterminated string"),
    "two objects on a line": (lines(json.dumps(GOOD) + json.dumps(NEXT)), "line 1: not JSON .Extra data"),
    "a number": (lines(GOOD, "7"), "line 2: expected an object with the keys id, prompt, category, received 7"),
    "null": (lines(GOOD, "null"), "line 2: expected an object"),
    "nested without end": (lines("[1," * 100_000), "line 1: not"),
    "a key twice": (lines('{"id": 1, "id": 2, "prompt": "x", "category": "y"}'), "the key 'id' is written twice"),
    "a misspelt key": (change(promt="x"), "line 2: unknown key 'promt'. Did you mean 'prompt'"),
    "a missing key": (lines(GOOD, {"id": 2, "prompt": "x"}), "line 2: no 'category'"),
    "a number for text": (change(prompt=7), "line 2: 'prompt' must be str, received 7"),
    "a list for text": (change(prompt=["a", "pot"]), "line 2: 'prompt' must be str"),
    "null for text": (change(prompt=None), "line 2: 'prompt' must be str, received None"),
    "text for an id": (change(id="2"), "line 2: 'id' must be int, received '2'"),
    "a float for an id": (change(id=2.0), "line 2: 'id' must be int, received 2.0"),
    "a truth for an id": (change(id=True), "line 2: 'id' must be int, received True"),
    "NaN for an id": (lines('{"id": NaN, "prompt": "x", "category": "y"}'), "line 1: not JSON .NaN is no JSON number"),
    "an id of 64 bits": (change(id=2**63), "line 2: 'id' must lie between -2.62 and 2.62"),
    "an id of 5,000 digits": (lines('{"id": %s, "prompt": "x", "category": "y"}' % ("9" * 5000)), "line 1: not JSON"),
    "an id twice": (lines(GOOD, GOOD | {"prompt": "x"}), "line 2: id 1 was used on line 1 already; ids must differ"),
    "a blank prompt": (change(prompt=" \t"), "line 2: the prompt with id 2 is blank"),
    "a prompt of zero width": (change(prompt="\u200b\ufeff"), "line 2: the prompt with id 2 is blank"),
    "half an emoji": (change(prompt="a pot \ud83d"), "'prompt' holds half a character .*U.D83D.* at character 7"),
    "the other half": (change(prompt="\ude00"), "line 2: 'prompt' holds half a character"),
    "half an emoji in a category": (change(category="x\ud83d"), "line 2: 'category' holds half a character"),
    "a NUL": (change(prompt="a\0b"), r"line 2: 'prompt' holds the control character U\+0000 at character 2"),
    "an escape": (change(prompt="\x1b[31mred"), r"the control character U\+001B at character 1"),
    "a prompt of 10^6 letters": (change(prompt="a" * 10**6), "line 2: 'prompt' has 1000000 characters; at most"),
    "a blank category": (change(category=""), "line 2: 'category': it is blank"),
    "a category with a slash": (change(category="plant/tree"), "line 2: 'category': 'plant/tree' holds a slash"),
    "a category with a blank behind": (change(category="plant "), "line 2: 'category': 'plant ' begins or ends with"),
    "a category of two lines": (change(category="a\nb"), "line 2: 'category': .* holds a tab or a line break"),
    "a category of 1,000 letters": (change(category="a" * 1000), "has 1000 characters; at most 100"),
    **{f"category {word}": (change(category=word), f"line 2: 'category': '{word}' is reserved") for word in RESERVED},
}  # fmt: skip


def message_of(read: Callable[[str], object], path: Path | str) -> str:
    with pytest.raises(ValueError) as caught:
        read(str(path))
    assert isinstance(caught.value, DataError)
    return str(caught.value)


@pytest.mark.parametrize("given", PROMPT_FILES)
def test_a_bad_prompt_file_is_named_with_its_line(tmp_path: Path, given: str) -> None:
    content, words = PROMPT_FILES[given]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    message = message_of(read_prompts, path)
    assert str(path) in message
    assert re.search(words, message, re.DOTALL), message
    message.encode()  # whatever was damaged, a terminal can show the message
    assert "\n" not in message


PATHS = {
    "a directory": ("folder", "is a directory: name a file in it. It holds inside.jsonl"),
    "nothing": ("nothing.jsonl", "No file '.*nothing.jsonl'"),
    "a misspelt name": ("promts.jsonl", r"Did you mean '.*prompts\.jsonl'"),
    "an address": ("https://host/prompts.jsonl", "local files alone: download it first"),
    "a home": ("~/prompts.jsonl", "'~' is not replaced here"),
    "blank": (" ", "is no path: name a file"),
    "a NUL": ("a\0b", "its path holds the control character"),
    "a device": ("/dev/null", "is no regular file"),
    "a name of 5,000 letters": ("a" * 5000, "Cannot read the file|No file"),
}


@pytest.mark.parametrize("given", PATHS)
def test_a_path_that_is_no_file_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("prompts.jsonl", "folder/inside.jsonl"):
        (tmp_path / name).write_bytes(lines(GOOD))
    path, words = PATHS[given]
    assert re.search(words, message_of(read_prompts, path)), message_of(read_prompts, path)


EDIT = {"id": 1, "instruction": "make it red", "source": "a.png", "category": "plant"}
NOTE = {"id": 1, "image": "a.png", "prompt": "a pot", "dimension": "alignment", "score": 3, "reasoning": ""}
PAIR = {"id": 1, "prompt": "a pot", "chosen": "a.png", "rejected": "b.png", "dimension": "alignment"}
#: a reader, a good row, what differs, and words of the message
ROWS = {
    "source is a number": ("edit", {"source": 3}, "'source' must be str"),
    "source is blank": ("edit", {"source": ""}, "source '' is a directory"),
    "source is a directory": ("edit", {"source": "folder"}, "source 'folder' is a directory"),
    "source is elsewhere": ("edit", {"source": "b/a.png"}, "source 'b/a.png' is not there .paths are relative to"),
    "source is misspelt": ("edit", {"source": "aa.png"}, "source 'aa.png' is not there.*Did you mean"),
    "source of 5,000 letters": ("edit", {"source": "a" * 5000}, "source 'aaa.* is not there"),
    "source is cut": ("edit", {"source": "cut.png"}, "source: Cannot read the image '.*cut.png': broken"),
    "source is empty": ("edit", {"source": "empty.png"}, r"source: Cannot read the image '.*empty.png': it is empty"),
    "source is text": ("edit", {"source": "text.png"}, "text.png': .*Formats that are read: PNG, JPEG"),
    "source is wide": ("edit", {"source": "wide.png"}, "wide.png' is 8 x 4; sources must be square here: crop it"),
    "source moves": ("edit", {"source": "moving.gif"}, "moving.gif': it holds 2 frames or pages"),
    "target is cut": ("edit", {"target": "cut.png"}, "target: Cannot read the image '.*cut.png'"),
    "instruction is blank": ("edit", {"instruction": "  "}, "the instruction with id 1 is blank"),
    "image is cut": ("note", {"image": "cut.png"}, "image: Cannot read the image '.*cut.png': broken"),
    "image is gone": ("note", {"image": "gone.png"}, "image 'gone.png' is not there"),
    "score is a text": ("note", {"score": "3"}, "'score' must be float, received '3'"),
    "score is 6": ("note", {"score": 6}, "'score' is 6; scores lie on the scale 1..5"),
    "score is infinite": ("note", {"score": 1e999}, "not JSON .Infinity is no JSON number"),
    "dimension is reserved": ("note", {"dimension": "mean"}, "'dimension': 'mean' is reserved"),
    "dimension is blank": ("note", {"dimension": " "}, "'dimension': it is blank"),
    "group is a list": ("note", {"group": [1]}, "'group' must be a number or a text"),
    "id is a list": ("note", {"id": [1]}, "'id' must be a number or a text"),
    "id is blank": ("note", {"id": ""}, "'id' must be a text of 1 to 200 characters"),
    "id is a novel": ("note", {"id": "x" * 9999}, "'id' must be a text of 1 to 200 characters"),
    "a line of its own": ("note", {"reasoning": "fine\nScore: 4"}, "has a line 'Score: ...' of its own"),
    "a pair of one": ("pair", {"rejected": "./a.png"}, "'chosen' and 'rejected' are the same image"),
    "a rejected one is cut": ("pair", {"rejected": "cut.png"}, "rejected: Cannot read the image '.*cut.png'"),
    "half an emoji": ("pair", {"prompt": "\ud83d"}, "'prompt' holds half a character"),
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    noise = Image.effect_noise((16, 16), 80).convert("RGB")
    for name in ("a.png", "b.png", "cut.png"):
        noise.save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("a cat")
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (8, 4)).save(tmp_path / "wide.png")
    noise.save(tmp_path / "moving.gif", save_all=True, append_images=[noise.rotate(90)])
    return tmp_path


@pytest.mark.parametrize("given", ROWS)
def test_a_bad_row_is_named_before_anything_is_trained(pictures: Path, given: str) -> None:
    kind, changes, words = ROWS[given]
    row = {"edit": EDIT, "note": NOTE, "pair": PAIR}[kind]
    read = {"edit": lambda path: read_edits(path, 16), "note": read_annotations, "pair": read_preferences}[kind]
    path = pictures / "rows.jsonl"
    path.write_bytes(lines(row | {"id": 7}, row | changes))
    message = message_of(read, path)
    assert message.startswith(f"{path}, line 2: ")
    assert re.search(words, message), message


def test_all_faults_of_all_files_come_in_one_message(pictures: Path) -> None:
    (pictures / "train.jsonl").write_bytes(lines(*(EDIT | {"id": i, "source": "cut.png"} for i in range(50))))
    (pictures / "validation.jsonl").write_bytes(lines(EDIT | {"id": 100, "instruction": ""}))
    files = {"train_file": "train", "validation_file": "validation", "test_file": "gone"}
    with pytest.raises(DataError) as caught:
        EditPairDataModule(image_size=16, **{key: f"{pictures}/{name}.jsonl" for key, name in files.items()})
    assert len(caught.value.faults) == 52
    assert str(caught.value).startswith("52 faults in the data:\n  1. ")
    assert f"... and {52 - SHOWN} more." in str(caught.value)
    assert "validation.jsonl, line 1" in caught.value.faults[50]
    assert "gone.jsonl" in caught.value.faults[51]


def prompts(directory: Path, held: bytes, train: bytes | None = None, split: str = "validation") -> PromptDataModule:
    train = train or lines(*(GOOD | {"id": i, "prompt": f"pot {i}"} for i in range(10)))
    others = lines(GOOD | {"id": 999, "prompt": "something else"})
    contents = {"train": train, "validation": others, "test": others} | {split: held}
    for name, content in contents.items():
        (directory / f"{name}.jsonl").write_bytes(content)
    return PromptDataModule(**{f"{name}_file": str(directory / f"{name}.jsonl") for name in contents})


def test_a_held_out_file_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    rows = [GOOD | {"id": i, "prompt": f"pot {i}"} for i in range(10)]
    with pytest.raises(DataError, match=r"data.validation_file '.*' is the same file as data.train_file"):
        prompts(tmp_path, lines(*rows))
    with pytest.raises(DataError, match=r"10 of the 10 prompts of data.validation_file .* with the same ids"):
        prompts(tmp_path, lines(*reversed(rows)))
    with pytest.warns(UserWarning, match=r"1 of the 2 prompts of data.validation_file .*line 1, which is line 4 there"):
        prompts(tmp_path, lines(GOOD | {"id": 77, "prompt": " POT  3"}, GOOD | {"id": 78}))


def test_categories_that_differ_in_case_alone_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="categories 'plant' and 'Plant' differ in case or form alone"):
        prompts(tmp_path, lines(GOOD | {"id": 77, "prompt": "another", "category": "Plant"}))


def test_images_that_are_trained_on_are_not_held_out(pictures: Path) -> None:
    (pictures / "train.jsonl").write_bytes(lines(NOTE, NOTE | {"id": 2, "image": "b.png"}))
    (pictures / "part.jsonl").write_bytes(lines(NOTE | {"id": 5}))
    train, part = (str(pictures / f"{name}.jsonl") for name in ("train", "part"))
    with pytest.warns(UserWarning, match=r"1 of the 1 rows of data\.validation_files are in data\.train_files"):
        AnnotationDataModule([train], [part], batch_size=2)
    with pytest.raises(ValueError, match=r"data\.train_files names '.*train\.jsonl' twice"):
        AnnotationDataModule([train, train], [part], batch_size=2)


def test_a_resumed_run_says_that_its_data_changed(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    held = lines(GOOD | {"id": 77, "prompt": "another"})
    before = prompts(tmp_path, held)
    saved = {"position": 3, "order": before.order(), "restriction": ""}
    prompts(tmp_path, held).load_state_dict(saved)
    prompts(tmp_path, held).load_state_dict({"position": 3})  # a checkpoint of an earlier version
    assert not [w for w in recwarn if "resumes" in str(w.message)]
    later = prompts(tmp_path, held, lines(*(GOOD | {"id": i, "prompt": f"jug {i}"} for i in range(12))))
    later.seed = 1
    with pytest.warns(UserWarning, match="resumes at batch 3") as caught:
        later.load_state_dict(saved)
    (said,) = [str(w.message) for w in caught if "resumes" in str(w.message)]
    assert "the content of data.train_file was" in said
    assert "the number of training prompts was 10 and is 12" in said
    assert "data.seed was 0 and is 1" in said
    assert "prompts_per_step" not in said


QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUIET
@given(
    text=st.text(min_size=1),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le"]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_a_text_comes_back_as_it_was_or_is_refused(tmp_path: Path, text: str, encoding: str, end: str) -> None:
    """Whatever tool wrote the file: never another prompt than the one that was written."""
    rows = [GOOD | {"id": 5, "prompt": "first"}, GOOD | {"prompt": text}]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes((end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end).encode(encoding))
    visible = any(unicodedata.category(c)[0] not in "ZC" for c in text)
    damaged = any(unicodedata.category(c) == "Cc" and c not in "\t\n\r\x85" for c in text)
    fits = encoding.startswith("utf-8") and visible and not damaged
    if fits:
        assert read_prompts(str(path)).texts == ("first", text)
    else:
        assert str(path) in message_of(read_prompts, path)


@QUIET
@given(
    identifier=st.one_of(
        st.integers(), st.floats(allow_subnormal=False), st.booleans(), st.text(), st.none(), st.lists(st.integers())
    )
)
def test_an_id_is_an_integer_that_can_key_noise_or_is_refused(tmp_path: Path, identifier: object) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(lines(GOOD | {"id": identifier}))
    if type(identifier) is int and abs(identifier) < 2**62:
        assert read_prompts(str(path)).groups.tolist() == [2 * identifier]
    else:
        assert f"{path}, line 1: " in message_of(read_prompts, path)
