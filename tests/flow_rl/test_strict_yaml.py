"""YAML keeps what was written: texts by any reader's rules, numbers by those of YAML 1.2, and nothing twice."""

from __future__ import annotations

import copy
import pickle

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_rl.strict_yaml import RepeatedKeyError, Scalar, YamlError, load, parse, values

#: words that some YAML reader takes for something else than a word
WORDS = (
    "77950e8", "1e5", "1e-4", "yes", "No", "ON", "off", "y", "null", "~", "012", "0o17", "0x1F", "1_000",
    "1:30", "2026-07-01", "2026-07-01 12:00:00", "+5", "-0", ".5", "5.", ".inf", ".NaN", "true", "False", "<<", "=",
)  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_word_keeps_its_text(word) -> None:
    assert parse(f"name: {word}\n", "f")["name"] == word


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("-3", -3), ("1_000", 1000), ("0x1F", 31), ("0o17", 15), ("0b11", 3), ("1e5", 1e5), ("1e-05", 1e-5),
        (".5", 0.5), ("1.", 1.0), ("-.inf", -float("inf")), ("true", True), ("FALSE", False), ("null", None),
        ("~", None), ("", None), ("012", "012"), ("1:30", "1:30"), ("yes", "yes"), ("off", "off"),
        ("2026-07-01", "2026-07-01"),
        ("tRue", "tRue"), ("1e", "1e"), ("0x", "0x"), ("'12'", "12"), ('"null"', "null"), ("!!str 12", "12"),
        ("!!int '12'", 12), ("|\n  12", "12"),
    ],
)  # fmt: skip
def test_value_without_a_type(text, value) -> None:
    found = values(parse(f"key: {text}", "f"))["key"]
    assert found == value
    assert type(found) is type(value)


@settings(max_examples=80, deadline=None)
@given(st.recursive(st.text(max_size=8), lambda inner: st.dictionaries(st.text(max_size=4), inner, max_size=3)))
def test_quoted_texts_come_back(tree) -> None:
    """Whatever PyYAML writes in double quotes is read as the same texts."""
    assert values(parse(yaml.safe_dump(tree, default_style='"', allow_unicode=False), "f")) == tree


@settings(max_examples=50, deadline=None)
@given(
    st.one_of(st.integers(), st.builds(lambda m, e: m * 10.0**e, st.integers(-(10**6), 10**6), st.integers(-30, 30)))
)
def test_numbers_that_pyyaml_writes_come_back(number) -> None:
    assert values(parse(yaml.safe_dump({"n": number}), "f")) == {"n": number}


@settings(max_examples=50, deadline=None)
@given(keys=st.lists(st.text("ab1é-", min_size=1, max_size=3), min_size=1, max_size=6), depth=st.integers(0, 3))
def test_a_repeated_key_is_refused_with_both_lines(keys, depth) -> None:
    lines = [f"{'  ' * level}level{level}:" for level in range(depth)]
    lines += [f"{'  ' * depth}'{key}': {number}" for number, key in enumerate(keys)]
    text = "\n".join(lines)
    if len(set(keys)) == len(keys):
        parse(text, "f.yaml")
        return
    second = next(place for place, key in enumerate(keys) if key in keys[:place])
    first = keys.index(keys[second])
    with pytest.raises(
        RepeatedKeyError, match=rf"^f\.yaml:{depth + second + 1}: .* first on line {depth + first + 1}:"
    ):
        parse(text, "f.yaml")


def test_anchors_and_merge_keys() -> None:
    text = "base: &b {lr: 1, decay: 2}\nother: &o {decay: 5, beta: 6}\nmine: {<<: [*b, *o], lr: 3}\n"
    assert values(parse(text, "f"))["mine"] == {"lr": 3, "decay": 2, "beta": 6}
    assert values(parse("a: &x [1, 2]\nb: *x", "f")) == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\n\tb: 2", "f.yaml:2: not valid YAML (column 1): a tab, where only spaces may stand"),
        ("a: [1\n", "f.yaml:2: not valid YAML (column 1)"),
        ("a: 1\n---\nb: 2", "f.yaml:2: not valid YAML (column 1): a second document"),
        ("a: *b", "undefined alias"),
        ("a: &x [*x]", "f.yaml:1: an anchor contains itself"),
        ("? [1]\n: 2", "f.yaml:1: a key must be a word"),
        ("a: {<<: 3}", "'<<' takes a mapping"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  <<: *x", "f.yaml:4: '<<' appears twice in one mapping, first on line 3"),
        ("a: !!binary aaaa", "f.yaml:1: the tag !!binary is not supported"),
        ("a: !!python/object/apply:os.system [ls]", "the tag !!python/object/apply:os.system is not supported"),
        ("a: \x01", "f.yaml:1: not valid YAML"),
    ],
)
def test_what_is_no_yaml_names_file_and_line(text, expected) -> None:
    with pytest.raises(YamlError) as refused:
        parse(text, "f.yaml")
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("a: 1\nb: é".encode("latin-1"), ":2: byte 0xe9 is not UTF-8"), ("a: 1".encode("utf-16"), "begins like UTF-16")],
)
def test_other_encodings_are_refused_and_a_byte_order_mark_is_not_text(content, expected, tmp_path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    with pytest.raises(YamlError) as refused:
        load(path)
    assert expected in str(refused.value)
    path.write_text("a: 1", encoding="utf-8-sig")
    assert load(path) == {"a": 1}


def test_a_scalar_survives_copies() -> None:
    scalar = Scalar("012", plain=False)
    for made in (copy.copy(scalar), copy.deepcopy(scalar), pickle.loads(pickle.dumps(scalar))):
        assert (made, made.plain, type(str(made))) == ("012", False, str)
