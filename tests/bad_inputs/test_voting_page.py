"""What browsers and strangers send to the voting page and put into its files, and what they are told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from flow_rl.evaluation import ballot as ballot_module
from flow_rl.evaluation import voting
from flow_rl.evaluation.ballot import Ballot, check_votes_file
from flow_rl.evaluation.battles import read_battles
from flow_rl.evaluation.vote_files import read_sources
from tests.bad_inputs.pictures import png


@pytest.fixture
def folders(tmp_path: Path) -> tuple[tuple[str, Path], tuple[str, Path]]:
    found = []
    for name in ("a", "b"):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "1.png").write_bytes(png())
        index(directory)
        found.append((name, directory))
    return tuple(found)


def index(directory: Path, **changes: Any) -> None:
    row = {"id": 1, "member": 0, "file": "1.png", "prompt": "<script>x</script>", "category": "c"} | changes
    (directory / "index.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def page_of(ballot: Ballot) -> TestClient:
    return TestClient(voting.build_app(ballot), base_url="http://localhost", follow_redirects=False)


#: what the index says of the image, and words of the refusal at start-up
FILES: dict[str, tuple[str, str]] = {
    "absolute": ("/etc/passwd", "lies outside of"),
    "above": ("../../etc/passwd", "lies outside of"),
    "of the other": ("../b/1.png", "lies outside of"),
    "a link": ("link.png", "lies outside of"),
    "a link to a folder": ("folder/passwd", "lies outside of"),
    "links in a circle": ("circle.png", "no path|no image"),
    "encoded": ("..%2f..%2fetc%2fpasswd", "no image"),
    "a zero byte": ("1.png\0.txt", "is no path"),
    "a long name": ("x" * 5000, "cannot be read|is no path"),
    "nothing": ("", "no image"),
    "a folder": (".", "no image"),
    "the index": ("index.jsonl", "is no PNG, JPEG, WebP or GIF"),
    "no picture": ("secret.png", "is no PNG, JPEG, WebP or GIF"),
    "damaged": ("damaged.png", "is damaged"),
    "missing": ("gone.png", "no image"),
}


@pytest.mark.parametrize("file, words", FILES.values(), ids=FILES.keys())  # noqa: PT006
def test_an_index_shows_its_own_pictures_alone(folders, tmp_path: Path, file: str, words: str) -> None:
    directory = folders[0][1]
    (directory / "link.png").symlink_to("/etc/passwd")
    (directory / "folder").symlink_to("/etc")
    (directory / "circle.png").symlink_to("circle.png")
    (directory / "secret.png").write_text("password")
    (directory / "damaged.png").write_bytes(png()[:40] + b"\0" * 40)
    index(directory, file=file)
    ballot = Ballot(*folders, tmp_path / "votes.jsonl")
    with pytest.raises(ValueError, match=rf"Prompt 1: .*({words})") as caught:
        ballot.check_images()
    assert len(str(caught.value)) < 1000
    (token,) = ballot.open()
    with page_of(ballot) as page:
        answers = [page.get(f"/image/{token}/{side}") for side in ("left", "right")]
    if file != "damaged.png":  # which is a picture all the same
        assert sorted(answer.status_code for answer in answers) == [200, 404]
    assert not any(b"root:" in answer.content or b"password" in answer.content for answer in answers)


def test_an_edit_file_shows_pictures_alone(folders, tmp_path: Path) -> None:
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"id": 1, "source": "../../../../../../etc/passwd"}\n', encoding="utf-8")
    ballot = Ballot(*folders, tmp_path / "votes.jsonl", sources=read_sources(edits))
    with pytest.raises(ValueError, match=r"Prompt 1: .*passwd' is no PNG"):
        ballot.check_images()
    with page_of(ballot) as page:
        assert page.get(f"/image/{ballot.open()[0]}/source").status_code == 404


FORM = {"Content-Type": "application/x-www-form-urlencoded"}
#: headers, body (TOKEN is the battle's), and status
VOTES: dict[str, tuple[dict[str, str], str, int]] = {
    "another host": ({"Host": "evil.example"}, "battle=TOKEN&vote=left", 400),
    "its own host": ({"Host": "evil.example", "Origin": "http://evil.example"}, "battle=TOKEN&vote=left", 400),
    "another origin": ({"Origin": "http://evil.example"}, "battle=TOKEN&vote=left", 400),
    "a file's origin": ({"Origin": "null"}, "battle=TOKEN&vote=left", 400),
    "another port": ({"Origin": "http://localhost:3000"}, "battle=TOKEN&vote=left", 400),
    "another site": ({"Sec-Fetch-Site": "cross-site"}, "battle=TOKEN&vote=left", 400),
    "a sibling site": ({"Sec-Fetch-Site": "same-site"}, "battle=TOKEN&vote=left", 400),
    "plain text": ({"Content-Type": "text/plain"}, "battle=TOKEN&vote=left", 415),
    "JSON": ({"Content-Type": "application/json"}, '{"battle": "TOKEN", "vote": "left"}', 415),
    "no type": ({"Content-Type": ""}, "battle=TOKEN&vote=left", 415),
    "long": ({}, "battle=TOKEN&vote=left&" + "x" * 2000, 413),
    "two votes": ({}, "battle=TOKEN&vote=left&vote=right", 400),
    "two battles": ({}, "battle=TOKEN&battle=TOKEN&vote=left", 400),
    "something else": ({}, "battle=TOKEN&vote=left&admin=1", 400),
    "no vote": ({}, "battle=TOKEN", 400),
    "nothing": ({}, "", 400),
    "another vote": ({}, "battle=TOKEN&vote=middle", 400),
    "another battle": ({}, "battle=TOKENx&vote=left", 400),
    "no UTF-8": ({}, "battle=%ff&vote=left", 400),
}  # fmt: skip


@pytest.mark.parametrize("headers, body, status", VOTES.values(), ids=VOTES.keys())  # noqa: PT006
def test_what_is_no_vote_changes_nothing(folders, tmp_path: Path, headers: dict, body: str, status: int) -> None:
    ballot = Ballot(*folders, tmp_path / "votes.jsonl")
    with page_of(ballot) as page:
        content = body.replace("TOKEN", ballot.open()[0])
        assert page.post("/vote", content=content, headers=FORM | headers).status_code == status
        assert not (tmp_path / "votes.jsonl").exists()
        chunks = (part.encode() for part in [content, "&" + "x" * 2000])  # a body that does not say how long it is
        assert page.post("/vote", content=chunks, headers=FORM | headers).status_code >= 400
    assert ballot.voted == 0


def test_the_page_lies_in_no_frame_and_runs_no_script(folders, tmp_path: Path) -> None:
    ballot = Ballot(*folders, tmp_path / "votes.jsonl")
    with page_of(ballot) as page:
        answer = page.get("/", headers={"Sec-Fetch-Site": "cross-site"})  # a link may stand anywhere
        image = page.get(f"/image/{ballot.open()[0]}/left")
    assert answer.status_code == 200
    assert "<script>x" not in answer.text
    assert "&lt;script&gt;x" in answer.text
    for found in (answer, image):
        assert "frame-ancestors 'none'" in found.headers["content-security-policy"]
        assert "default-src 'none'" in found.headers["content-security-policy"]
        assert found.headers["x-frame-options"] == "DENY"
        assert found.headers["cross-origin-resource-policy"] == "same-origin"
    assert image.headers["content-type"] == "image/png"


def row(**changes: Any) -> bytes:
    return json.dumps({"id": 2, "member": 0, "file": "x", "prompt": "", "category": ""} | changes).encode()


#: a line of a file, and words of the message
LINES: dict[str, tuple[bytes, str]] = {
    "torn": (b'{"id": 1, "mem', "line 2: not JSON .*Remove the line if it is torn"),
    "not UTF-8": (b'{"id": 1, "prompt": "\xff"}', "line 2: not UTF-8"),
    "no object": (b"[1]", "line 2: expected an object"),
    "missing": (b'{"id": 1}', "line 2: .*member, file, prompt, category is missing"),
    "a text as id": (row(id="1"), "'id' must be int"),
    "true as id": (row(id=True), "'id' must be int, received True"),
    "twice": (b'{"id": 1, "id": 2}', "line 2: 'id' is there twice"),
    "NaN": (b'{"id": NaN}', "line 2: NaN is no number"),
    "a long number": (b'{"id": ' + b"9" * 5000 + b"}", "line 2: "),
    "deep": (b"[" * 100_000, "line 2: (brackets in brackets|not JSON)"),
    "half an emoji": (row(prompt="\ud83d"), "'prompt' has half a character"),
}  # fmt: skip


@pytest.mark.parametrize("line, words", LINES.values(), ids=LINES.keys())  # noqa: PT006
def test_lines_that_cannot_be_read_are_named(folders, tmp_path: Path, line: bytes, words: str) -> None:
    path = folders[0][1] / "index.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=rf"index\.jsonl, {words}|index\.jsonl, line 2: .*{words}") as caught:
        Ballot(*folders, tmp_path / "votes.jsonl")
    assert len(str(caught.value)) < 600
    votes = tmp_path / "battles.jsonl"
    votes.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=r"battles\.jsonl, line 2: "):
        read_battles(votes)


def test_a_vote_after_a_torn_line_stays_whole(folders, tmp_path: Path) -> None:
    votes = tmp_path / "votes.jsonl"
    ballot = Ballot(*folders, votes)
    votes.write_text('{"prompt": 1, "mem', encoding="utf-8")  # by another voter, since
    ballot.vote(ballot.open()[0], "left")
    torn, vote, rest = votes.read_text().split("\n")
    assert (torn, rest) == ('{"prompt": 1, "mem', "")
    assert json.loads(vote)["prompt"] == 1


def test_a_vote_that_the_disk_does_not_take_does_not_count(
    folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    votes = tmp_path / "votes.jsonl"
    votes.write_text("\n", encoding="utf-8")
    ballot = Ballot(*folders, votes)
    write = ballot_module.os.write
    monkeypatch.setattr(ballot_module.os, "write", lambda descriptor, data: write(descriptor, data[:10]))
    with page_of(ballot) as page:
        answer = page.post("/vote", data={"battle": ballot.open()[0], "vote": "left"})
    monkeypatch.undo()
    assert answer.status_code == 507
    assert "could not be written" in answer.json()["detail"]
    assert re.match(r"error: a vote was not written: .*10 of \d+ bytes .*votes\.jsonl", capsys.readouterr().err)
    assert votes.read_text(encoding="utf-8") == "\n"
    assert ballot.voted == 0


def test_votes_need_a_file(tmp_path: Path, folders, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="expected a file"):
        check_votes_file(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Votes cannot be written to .*(Not a directory|File exists)"):
        check_votes_file(tmp_path / "file" / "votes.jsonl")
    given = [f"--left={folders[0][1]}", f"--right={folders[1][1]}", f"--votes={tmp_path / 'v.jsonl'}"]
    for more, words in (
        ("--port=70000", "--port must be from 0 to 65535, received 70000"),
        (f"--votes={tmp_path}", "expected a file"),
        (f"--edits={tmp_path / 'none.jsonl'}", "No file"),
    ):
        with pytest.raises(SystemExit) as caught:
            voting.main([*given, more])
        assert caught.value.code == 2
        assert words in capsys.readouterr().err
