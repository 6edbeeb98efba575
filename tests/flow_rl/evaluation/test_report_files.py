import dataclasses
import json
import math
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from flow_rl.errors import CannotWrite
from flow_rl.evaluation.arena import Rating
from flow_rl.evaluation.curves import Curve
from flow_rl.evaluation.pipeline_picture import Box, pipeline_picture
from flow_rl.evaluation.records import Claim, Comparison, ComparisonRow, Report, RewardAgreement, Watch
from flow_rl.evaluation.report import write_report
from flow_rl.evaluation.statistics import Interval
from flow_rl.files import MANIFEST

NASTY = 'a <b>cat</b> & "dog" <script>alert(1)</script>'
HALF = Interval(mean=0.5, low=0.4, high=0.6, n=20)


def _report(**changes) -> Report:
    row = ComparisonRow(
        prompt=NASTY,
        images={"base": torch.rand(3, 8, 8), "student": [torch.rand(3, 8, 8), torch.rand(3, 8, 8)]},
        scores={"base": 0.25, "student": math.nan},
        source=torch.rand(3, 8, 8),
    )
    fields = {
        "title": "Before & after",
        "summary": ["What <we> did."],
        "models": ["base", "student"],
        "bench": {"t2i": {"alignment": {"base": HALF, "student": HALF}}},
        "bench_parts": {"t2i": {"alignment/text": {"base": HALF}}},
        "categories": {"t2i": {"portrait": {"base": HALF}}},
        "gains": {"t2i": {"portrait": Interval(mean=-0.1, low=-0.2, high=-0.05, n=20), "overall": HALF}},
        "pipeline": [Box(name="base <0>", note="n", row=0), Box(name="s", note="m", row=1, after=["base <0>"])],
        "claims": [
            Claim(text="1 < 2", found="0.5", verdict="undecided"),
            Claim(text="2 < 3", found="0.5", verdict="holds", interval=HALF),
            Claim(text="3 < 4", found="0.5", verdict="fails", interval=HALF),
        ],
        "curves": [Curve(name="reward <1>", x=[0, 1], y=[1.0, 2.0], low=[0.0, 1.0], high=[2.0, 3.0])],
        "grids": [Comparison(category="portrait", rows=[row])],
        "arena": {"t2i": {"base": Rating(elo=960.0, low=940.0, high=980.0)}},
        "arena_categories": {"t2i": {"portrait": {"student": Rating(elo=1070.0, low=1040.0, high=1080.0)}}},
        "reward_validation": {"alignment": {"srcc": 0.875, "count": 300.0}},
        "reward_model": {
            "alignment": {
                "all": [
                    RewardAgreement(on="base", srcc=0.75, pairwise_in_group=0.625, n=40),
                    RewardAgreement(on="teacher", srcc=math.nan, pairwise_in_group=0.5, n=40),
                ]
            }
        },
        "monitoring": {
            "mix <rl>": Watch(
                looks=3,
                reward_change=0.5,
                monitor_change=-0.25,
                gap=Curve(name="mix <rl>", x=[0, 8], y=[0.0, 0.75]),
                alerts=["hacking <p>"],
            )
        },
        "seconds": {"rollout": 61.0, "update": 0.5},
        "settings": {"seed": 0, "model": {"lr": 1e-4, "guidance": [0.6, 1.0]}},
        "commands": ["make demo", "python train.py fit --model.x='<1>' && echo done"],
        "notes": ["One seed."],
    }
    return Report(**(fields | changes))


class _Page(HTMLParser):
    """Collects elements, and checks that they are closed in the order in which they were opened."""

    VOID = frozenset({"meta", "img", "line", "circle", "polyline", "polygon"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(tmp_path) -> _Page:
    return _Page(write_report(_report(), tmp_path)[0].read_text(encoding="utf-8"))


def test_json_follows_the_schema(tmp_path):
    path = write_report(_report(), tmp_path)[1]
    half = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 20}
    in_numbers = {"value": 0.5, "low": 0.4, "high": 0.6}
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "models": ["base", "student"],
        "bench": {"t2i": {"alignment": {"base": half, "student": half}}, "edit": {}},
        "arena": {"t2i": {"base": {"elo": 960.0, "low": 940.0, "high": 980.0}}, "edit": {}},
        "seconds": {"rollout": 61.0, "update": 0.5},
        "settings": {"seed": 0, "model": {"lr": 1e-4, "guidance": [0.6, 1.0]}},
        "bench_parts": {"t2i": {"alignment/text": {"base": half}}},
        "categories": {"t2i": {"portrait": {"base": half}}},
        "gains": {"t2i": {"portrait": {"mean": -0.1, "low": -0.2, "high": -0.05, "n": 20}, "overall": half}},
        "arena_categories": {"t2i": {"portrait": {"student": {"elo": 1070.0, "low": 1040.0, "high": 1080.0}}}},
        "claims": [
            {"text": "1 < 2", "found": "0.5", "verdict": "undecided", "holds": None}
            | {"value": None, "low": None, "high": None},
            {"text": "2 < 3", "found": "0.5", "verdict": "holds", "holds": True} | in_numbers,
            {"text": "3 < 4", "found": "0.5", "verdict": "fails", "holds": False} | in_numbers,
        ],
        "reward_validation": {"alignment": {"srcc": 0.875, "count": 300.0}},
        "reward_model": {
            "alignment": {
                "all": {"on": "base", "srcc": 0.75, "pairwise_in_group": 0.625, "n": 40}
                | {"teacher": {"on": "teacher", "srcc": None, "pairwise_in_group": 0.5, "n": 40}}
            }
        },
        "monitoring": {
            "mix <rl>": {"looks": 3, "reward_change": 0.5, "monitor_change": -0.25, "alerts": ["hacking <p>"]}
        },
        "alerts": {"mix <rl>": 1},
        "commands": ["make demo", "python train.py fit --model.x='<1>' && echo done"],
    }


def test_page_needs_nothing_from_outside(page):
    links = [attrs[key] for _, attrs in page.elements for key in ("src", "href", "srcset", "data") if key in attrs]
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    style = "".join(page.text)
    assert "@import" not in style
    assert "url(" not in style
    references = [value for _, attrs in page.elements for value in attrs.values() if value and "url(" in value]
    assert all(value == "url(#tip)" for value in references)


def test_page_is_well_formed_and_its_links_lead_somewhere(page):
    assert page.open == []
    ids = {attrs["id"] for tag, attrs in page.elements if tag == "section"}
    targets = {attrs["href"][1:] for tag, attrs in page.elements if tag == "a"}
    assert targets == ids
    assert "limits" in ids


def test_every_image_says_what_it_shows(page):
    alts = [attrs.get("alt") for tag, attrs in page.elements if tag == "img"]
    assert alts == [
        f"source: {NASTY}",
        f"base: {NASTY}",
        f"student, sample 1: {NASTY}",
        f"student, sample 2: {NASTY}",
    ]
    drawings = [attrs for tag, attrs in page.elements if tag == "svg"]
    assert all("aria-label" in attrs or attrs.get("aria-hidden") == "true" or attrs == {} for attrs in drawings)


def test_text_is_escaped(page):
    assert NASTY in page.text
    assert "Before & after" in page.text
    assert any("--model.x='<1>' && echo done" in text for text in page.text)
    assert not {"b1", "script", "we"} & {tag for tag, _ in page.elements}


def test_numbers_are_shown(page):
    text = " ".join(page.text)
    for expected in (
        "0.500",
        "0.400–0.600",
        "−0.100",
        "1 min 01 s",
        "model.guidance",
        "not scored",
        "960",
        "1 fell",
    ):
        assert expected in text, expected


def test_percent_scores_gain_in_points(tmp_path):
    html = write_report(_report(score_format=".1%"), tmp_path)[0].read_text(encoding="utf-8")
    assert "50.0%" in html
    assert "−10.0</b>" in html
    assert "+50.0 points" in html


def test_a_bare_report_has_no_empty_sections(tmp_path):
    report = Report(title="t", summary=[], models=["base"], bench={})
    html_path, json_path = write_report(report, tmp_path / "new" / "place")
    assert "<section" not in html_path.read_text(encoding="utf-8")
    assert json.loads(json_path.read_text())["arena"] == {"t2i": {}, "edit": {}}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch, failing):
    paths = write_report(_report(), tmp_path)
    before = [path.read_bytes() for path in paths]

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(CannotWrite, match="disk full"):
        write_report(_report(title="New"), tmp_path)
    assert [path.read_bytes() for path in paths] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "report.html", "report.json"]


def test_a_killed_write_leaves_the_old_report(tmp_path, monkeypatch):
    paths = write_report(_report(), tmp_path)
    before = [path.read_bytes() for path in paths]
    # The child dies after writing a part, without any clean-up.
    monkeypatch.setattr(os, "fsync", lambda descriptor: os._exit(9))
    child = os.fork()
    if child == 0:
        write_report(_report(title="New"), tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path.read_bytes() for path in paths] == before


def _with_row(**changes) -> dict:
    row = ComparisonRow(prompt="p", images={"base": torch.rand(3, 4, 4)})
    return {"grids": [Comparison(category="c", rows=[dataclasses.replace(row, **changes)])]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bench": {"t2i": {"alignment": {"studnet": HALF}}}},
            r"bench\['t2i'\]\['alignment'\].*Did you mean 'student'",
        ),
        ({"bench": {"t2l": {}}}, "Unknown task: 't2l'.*Did you mean 't2i'"),
        ({"categories": {"t2i": {"portrait": {"teacher": HALF}}}}, r"categories\['t2i'\]\['portrait'\]: 'teacher'"),
        ({"gains": {"t2l": {}}}, "Unknown task: 't2l'"),
        ({"arena": {"edit": {"teacher": Rating(elo=1.0, low=0.0, high=2.0)}}}, r"arena\['edit'\]: 'teacher'"),
        (_with_row(scores={"Base": 1.0}), "scores: 'Base'"),
        (_with_row(images={"bsae": torch.rand(3, 4, 4)}), "Did you mean 'base'"),
        ({"models": []}, "at least one model"),
        ({"models": ["base", "base"]}, "each once"),
        ({"summary": "one string"}, "summary must be a list"),
        ({"commands": "make demo"}, "commands must be a list"),
        ({"seconds": {"rollout": -1.0}}, "'rollout' took -1.0"),
        ({"score_format": "%.2f!"}, "score_format '%.2f!'"),
    ],
)
def test_bad_reports_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        _report(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"path": Path("x")}}, "plain JSON.*PosixPath"),
        ({"settings": {"lr": math.nan}}, "plain JSON"),
        (_with_row(images={"base": torch.rand(4, 4)}), r"\(3, H, W\), received"),
    ],
)
def test_unwritable_reports_leave_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_report(_report(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_in_place_of_the_directory_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        write_report(_report(), tmp_path / "run")


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([Box(name="a", note="", row=0), Box(name="a", note="", row=1)], "different names"),
        ([Box(name="a", note="", row=0, after=["b"])], "comes from 'b'"),
        ([Box(name="a", note="", row=0), Box(name="b", note="", row=0, after=["a"])], "no box in a row above"),
    ],
)
def test_bad_pictures_are_named(boxes, message):
    with pytest.raises(ValueError, match=message):
        pipeline_picture(boxes)


def test_a_claim_has_a_known_verdict():
    with pytest.raises(ValueError, match="'maybe'"):
        Claim(text="t", found="f", verdict="maybe")
