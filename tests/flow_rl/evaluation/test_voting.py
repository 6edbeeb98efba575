from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from fastapi.testclient import TestClient

from flow_rl.evaluation.ballot import Ballot
from flow_rl.evaluation.battles import read_battles
from flow_rl.evaluation.grids import to_png
from flow_rl.evaluation.rate_battles import main as rate_main
from flow_rl.evaluation.vote_files import read_sources
from flow_rl.evaluation.voting import VotingServer, build_app

NAMES = ("secret_base", "secret_student")


def _images(directory: Path, level: float, prompts: int) -> Path:
    directory.mkdir()
    rows = []
    for i in range(prompts):
        (directory / f"{1000 + i}_0.png").write_bytes(to_png(torch.full((3, 2, 2), level)))
        rows.append({"id": 1000 + i, "member": 0, "prompt": f"a <b>{i}</b>", "category": "xy"[i % 2]})
        rows[-1]["file"] = f"{1000 + i}_0.png"
    (directory / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return directory


@pytest.fixture
def folders(tmp_path: Path) -> tuple[tuple[str, Path], tuple[str, Path]]:
    directories = (_images(tmp_path / "one", 0.2, 24), _images(tmp_path / "two", 0.8, 24))
    return tuple(zip(NAMES, directories, strict=True))


@pytest.fixture
def votes(tmp_path: Path) -> Path:
    return tmp_path / "votes" / "votes.jsonl"


def _dark(png: bytes, folders) -> bool:
    return png == (folders[0][1] / "1000_0.png").read_bytes()


@pytest.fixture
def client(folders, votes) -> Iterator[httpx.Client]:
    with VotingServer(Ballot(*folders, votes), port=0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}", follow_redirects=True) as found:
            yield found
        server.shutdown()
        thread.join()


def _token(page: str) -> str:
    return page.split('name="battle" value="')[1].split('"')[0]


def test_a_voter_who_prefers_dark_images_rates_their_model_higher(client, folders, votes, capsys):
    lefts = []
    for battle in range(24):
        page = client.get("/")
        token = _token(page.text)
        lefts.append(_dark(client.get(f"/image/{token}/left").content, folders))
        assert lefts[-1] != _dark(client.get(f"/image/{token}/right").content, folders)
        # Every sixth vote is for the bright image: nobody wins everything.
        wanted = "left" if lefts[-1] == (battle % 6 != 0) else "right"
        assert client.post("/vote", data={"battle": token, "vote": wanted}).status_code == 200
    assert "Done" in client.get("/").text
    assert 4 < sum(lefts) < 20  # sides are drawn
    battles = read_battles(votes)
    wins = [b.credit if b.first == NAMES[0] else 1 - b.credit for b in battles]
    assert (len(battles), sum(wins)) == (24, 20)
    assert {b.category for b in battles} == {"x", "y"}
    rate_main([str(votes)])
    printed = capsys.readouterr().out
    assert printed.index(NAMES[0]) < printed.index(NAMES[1])
    assert "24 battles on 24 prompts" in printed


def test_pages_do_not_tell_who_made_what(client):
    response = client.get("/")
    token = _token(response.text)
    everything = response.text + str(response.headers) + str(client.get(f"/image/{token}/left").headers)
    for clue in (*NAMES, "one", "two", "1000", ".png"):
        assert clue not in everything.replace("none", "").replace("json", ""), clue
    assert "a &lt;b&gt;" in response.text
    assert "<script" not in response.text


def test_an_interrupted_vote_goes_on(folders, votes):
    ballot = Ballot(*folders, votes)
    for token in ballot.open()[:5]:
        ballot.vote(token, "tie")
    again = Ballot(*folders, votes)
    assert (again.voted, len(again.open())) == (5, 19)
    assert again.open()[:3] != ballot.open()[:3]  # another order
    other = Ballot(folders[0], ("third", folders[1][1]), votes)
    assert other.voted == 0


def test_a_battle_has_one_vote_and_one_order(folders, votes):
    ballot = Ballot(*folders, votes)
    token = ballot.open()[0]
    assert ballot.image(token, "left") == ballot.image(token, "left")
    threads = [threading.Thread(target=ballot.vote, args=(token, "left")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(votes.read_text().splitlines()) == 1


def test_what_is_not_a_vote_is_refused(client, votes):
    token = _token(client.get("/").text)
    for data in ({"battle": token, "vote": "base"}, {"battle": "x", "vote": "left"}, {"vote": "left"}):
        assert client.post("/vote", data=data).status_code == 400
    assert client.post("/vote", data={}).status_code == 415  # no form at all
    assert client.post("/vote", data={"x": "x" * 2000}).status_code == 413
    foreign = client.post("/vote", data={"battle": token, "vote": "left"}, headers={"Origin": "http://example.org"})
    assert foreign.status_code == 400
    for path in ("/index.jsonl", "/image/../left", f"/image/{token}/both", f"/image/{token}/source", "/favicon.ico"):
        assert client.get(path).status_code == 404
    assert not votes.exists()


def test_edits_show_their_source(folders, votes):
    source = folders[0][1] / "1003_0.png"
    ballot = Ballot(*folders, votes, sources={1003: source})
    shown = [token for token in ballot.open() if ballot.has_source(token)]
    assert len(shown) == 1
    assert ballot.image(shown[0], "source") == (source.read_bytes(), "image/png")


def test_bad_folders_are_named(folders, votes, tmp_path):
    with pytest.raises(ValueError, match=r"callbacks\.ImageWriter"):
        Ballot(folders[0], ("other", tmp_path), votes)
    with pytest.raises(ValueError, match="Both models are called"):
        Ballot(folders[0], folders[0], votes)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "index.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="no prompt id in common"):
        Ballot(folders[0], ("other", empty), votes)


def test_another_host_name_cannot_vote(client, votes):
    """DNS rebinding: a foreign site points its own name at this machine, so that its pages have our origin."""
    token = _token(client.get("/").text)
    host = f"evil.example:{client.base_url.port}"
    data, headers = {"battle": token, "vote": "left"}, {"Host": host, "Origin": f"http://{host}"}
    assert client.post("/vote", data=data, headers=headers).status_code == 400
    assert client.get("/", headers={"Host": host}).status_code == 400
    assert not votes.exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [("/etc/hostname", "lies outside"), ("../two/1000_0.png", "lies outside"), ("missing.png", "no image")],
)
def test_an_index_shows_images_of_its_own_folder_alone(folders, votes, file, message):
    index = folders[0][1] / "index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    rows[2]["file"] = file
    index.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ballot = Ballot(*folders, votes)
    with pytest.raises(ValueError, match=f"Prompt 1002: .*{message}"):
        ballot.check_images()
    with TestClient(build_app(ballot), base_url="http://localhost") as client:
        answers = [client.get(f"/image/{token}/{side}") for token in ballot.open() for side in ("left", "right")]
    assert sorted({answer.status_code for answer in answers}) == [200, 404]


def test_torn_lines_and_missing_sources_are_named(folders, votes, tmp_path):
    votes.parent.mkdir()
    votes.write_text('{"prompt": 1000, "member": 0, "first": "a", "second": "b"}\n{"prompt": 10', encoding="utf-8")
    with pytest.raises(ValueError, match=r"votes\.jsonl, line 2: not JSON"):
        Ballot(*folders, votes)
    with pytest.raises(ValueError, match=r"Prompt 1003: no image .*gone\.png"):
        Ballot(*folders, tmp_path / "none.jsonl", sources={1003: tmp_path / "gone.png"}).check_images()
    index = folders[1][1] / "index.jsonl"
    index.write_text('{"id": 1000, "member": 0}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.jsonl, line 1: .*file, prompt, category is missing"):
        Ballot(*folders, tmp_path / "none.jsonl")
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"id": 3, "source": "a.png"}\n[]\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"edits\.jsonl, line 2: expected an object with id, source"):
        read_sources(edits)
