"""The type of a setting says what was written: in files, on the command line, after references and in saved configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ActionConfigFile, ArgumentError

from cli.literal_text import LiteralParser, dump, finished, install
from flow_rl.strict_yaml import parse, values
from tests.flow_rl.test_strict_yaml import WORDS

TEXTS = st.one_of(st.sampled_from(WORDS), st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12))


class Holder:
    """Settings of a class."""

    def __init__(self, name: str = "", either: int | str | None = None, free: Any = None) -> None:
        self.name, self.either, self.free = name, either, free


def parser() -> LiteralParser:
    install()
    made = LiteralParser(exit_on_error=False)
    made.add_argument("--config", action=ActionConfigFile)
    for name, kind in {
        "name": str, "maybe": str | None, "steps": int, "rate": float, "on": bool, "either": int | str | None,
        "choice": Literal["32", 16, "auto"], "names": list[str], "table": dict[str, str], "numbers": dict[str, float],
        "free": Any, "copy": str,
    }.items():  # fmt: skip
        made.add_argument(f"--{name}", type=kind)
    made.add_subclass_arguments(Holder, "holder", required=False)
    return made


PARSER = parser()


def from_options(*args: str) -> Any:
    return finished(PARSER.parse_args(list(args)))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("literal") / "f.yaml"


def from_file(path: Path, text: str) -> Any:
    path.write_text(text, encoding="utf-8")
    return from_options(f"--config={path}")


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_a_text_setting_keeps_what_the_command_line_says(text) -> None:
    if "${" in text:
        return
    found = from_options(f"--name={text}", "--copy=${name}")
    assert (found.name, found.copy) == (text, text)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_every_setting_keeps_a_quoted_text(path, text) -> None:
    quoted = json.dumps(text.replace("${", r"\${"), ensure_ascii=True)
    if any(0xD800 <= ord(c) <= 0xDFFF or ord(c) > 0xFFFF for c in text):
        return  # JSON's pairs of surrogates are not YAML's
    lines = [f"{key}: {quoted}" for key in ("name", "maybe", "either", "free")]
    holder = f"holder: {{class_path: {Holder.__module__}.Holder, init_args: {{name: {quoted}, either: {quoted}}}}}"
    lines += [f"names: [{quoted}]", f"table: {{{quoted}: {quoted}}}", "copy: ${name}", holder]
    found = from_file(path, "\n".join(lines))
    key = text.replace("${", r"\${")
    assert (found.name, found.maybe, found.either, found.free, found.copy) == (text,) * 5
    assert (found.names, found.table) == ([text], {key: text})
    assert (found.holder.init_args.name, found.holder.init_args.either) == (text, text)
    built = PARSER.instantiate_classes(found).holder
    assert (built.name, built.either) == (text, text)


@settings(max_examples=30, deadline=None)
@given(text=TEXTS)
def test_a_saved_configuration_reads_as_it_was(path, text) -> None:
    before = from_options(f"--name={text.replace('${', '')}", "--copy=${name}", "--either=3", "--free=[1, a]")
    saved = dump(PARSER.dump(before, skip_none=False) and values(parse(PARSER.dump(before), "saved")))
    after = from_file(path, saved)
    for key in ("name", "copy", "either", "free"):
        assert after[key] == before[key]
    assert yaml.safe_load(saved)["name"] == before.name  # other readers see a text, too


@pytest.mark.parametrize("word", [word for word in WORDS if word not in ("<<", "=")])
def test_a_plain_word_is_a_text_where_a_text_is_asked_for(path, word) -> None:
    found = from_file(path, f"name: {word}\nnames: [{word}]\ntable: {{{word}: {word}}}\ncopy: ${{name}}\n")
    assert (found.name, found.names, found.table, found.copy) == (word, [word], {word: word}, word)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("steps: 1_000", "steps", 1000), ("steps: '7'", "steps", 7), ("rate: 1e-5", "rate", 1e-5),
        ("rate: 3", "rate", 3.0),
        ("rate: '1e-5'", "rate", 1e-5), ("on: yes", "on", True), ("on: Off", "on", False), ("on: true", "on", True),
        ("maybe: null", "maybe", None), ("maybe: 'null'", "maybe", "null"), ("maybe:", "maybe", None),
        ("either: 3", "either", 3), ("either: '3'", "either", "3"), ("either: 1e3", "either", "1e3"),
        ("either: ~", "either", None), ("choice: 32", "choice", "32"), ("choice: 16", "choice", 16),
        ("choice: '16'", "choice", 16), ("free: 012", "free", "012"), ("free: '[1]'", "free", "[1]"),
        ("free: {a: 1, b: yes}", "free", {"a": 1, "b": "yes"}),
        ("numbers: {on: 1e-1, 1: 2}", "numbers", {"on": 0.1, "1": 2.0}), ("name:", "name", ""),
    ],
)  # fmt: skip
def test_types_decide(path, line, key, value) -> None:
    for text in (line, f"{line}\ncopy: ${{name}}\nname: x\n" if key not in ("name", "copy") else line):
        found = from_file(path, text)[key]
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    "line", ["steps: 012", "steps: 1:30", "steps: yes", "steps: 1.5", "rate: 1:30", "on: 3", "steps:"]
)
def test_what_a_type_does_not_take_is_refused_in_files_and_options(path, line) -> None:
    key, _, value = line.partition(":")
    with pytest.raises((ArgumentError, ValueError)):
        from_file(path, line)
    with pytest.raises((ArgumentError, ValueError)):
        from_options(f"--{key}={value.strip()}")
