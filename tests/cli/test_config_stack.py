"""The order of configuration files: what one would silently undo of another is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.config_stack import content_of, expand, settings_only
from flow_rl.errors import SettingError
from flow_rl.strict_yaml import parse
from tests.expectations import does_not_raise

ROOT = Path(__file__).parents[2]
TEACHER, STUDENT = "configs/demo/t2i_teacher.yaml", "configs/demo/student.yaml"
FILTER = "configs/filter/offline.yaml"
STAGES = {
    *(
        f"configs/demo/{name}.yaml"
        for name in ("edit_teacher", "mix_rl", "pretrain", "reward", "student", "t2i_teacher")
    ),
    *(f"configs/qwen_image/grpo_{task}.yaml" for task in ("t2i", "edit")),
    *(f"configs/qwen_image_21/{name}.yaml" for name in ("distill", "grpo_edit", "grpo_t2i", "mix_rl", "reward")),
}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


def write(directory: Path, **contents: str) -> None:
    for name, content in contents.items():
        (directory / f"{name}.yaml").write_text(content)


def test_included_files_come_before_the_file_that_includes_them(tmp_path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, a="include: [deep/b.yaml, d.yaml]", d="", last="include: e.yaml", e="")
    write(tmp_path / "deep", b="include: ../c.yaml")
    write(tmp_path, c="")
    given = ["fit", "--config", f"{tmp_path}/a.yaml", "--run.name=x", f"--config={tmp_path}/last.yaml"]
    first = [f"--config={tmp_path}/{name}.yaml" for name in ("c", "deep/b", "d", "a")]
    assert expand(given) == ["fit", *first, "--run.name=x", *(f"--config={tmp_path}/{n}.yaml" for n in ("e", "last"))]


def test_what_is_no_file_is_left_to_the_parser() -> None:
    given = ["fit", "--run.name=x", "--config=b.yaml", "-c", "c.yaml", "--config"]
    assert expand(given) == ["fit", "--run.name=x", "--config=b.yaml", "--config=c.yaml", "--config"]


def test_a_circle_is_refused(tmp_path) -> None:
    write(tmp_path, a="include: b.yaml", b="include: a.yaml")
    with pytest.raises(SettingError, match=r"a.yaml includes .*b.yaml includes .*a.yaml: a file can't"):
        expand([f"--config={tmp_path}/a.yaml"])


def test_a_missing_file_is_refused_where_it_is_named(tmp_path) -> None:
    write(tmp_path, a="include: b.yaml", b="include: stag.yaml", stage="")
    with pytest.raises(SettingError, match=r"b.yaml includes 'stag.yaml', but .*Did you mean '.*stage.yaml'"):
        expand([f"--config={tmp_path}/a.yaml"])


@pytest.mark.parametrize("order", [("mine", "base"), ("base", "mine"), ("base", "base")])
def test_a_file_that_comes_twice_is_refused(order, tmp_path) -> None:
    write(tmp_path, mine="include: base.yaml", base="")
    with pytest.raises(SettingError, match=r"base.yaml.* comes a second time"):
        expand([f"--config={tmp_path}/{name}.yaml" for name in order])


def test_stage_first_is_fine() -> None:
    with does_not_raise(SettingError):
        expand(["fit", f"--config={TEACHER}", f"--config={FILTER}", "--config=configs/adapter/lora.yaml"])


@pytest.mark.parametrize("order", [(TEACHER, STUDENT), (STUDENT, TEACHER)])
def test_two_stages_are_refused(order) -> None:
    with pytest.raises(SettingError, match="A run has one stage") as refused:
        expand(["fit", *(f"--config={path}" for path in order)])
    assert str(refused.value).index(order[0]) < str(refused.value).index(order[1])


def test_a_users_variant_of_a_stage_may_replace_it(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {class_path: my_package.Policy}")
    with does_not_raise(SettingError):
        expand(["fit", f"--config={TEACHER}", f"--config={tmp_path}/mine.yaml"])


@pytest.mark.parametrize("content", ["just text", "", "model: [1]", "model: {class_path: 3}"])
def test_what_is_no_config_is_left_to_the_parser(content, tmp_path) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with does_not_raise(SettingError):
        expand(["fit", f"--config={TEACHER}", f"--config={tmp_path}/bad.yaml", "--config=missing.yaml"])


@pytest.mark.parametrize("content", [{"run": {"name": "x"}}, {"callbacks": {"ema": None}}, "just text", None, ["a"]])
def test_content_without_own_keys_reaches_the_parser_as_it_is(content) -> None:
    assert settings_only(content, ["ema"]) == content


def test_own_keys_do_not_reach_the_parser() -> None:
    tree = parse("include: a.yaml\ncallbacks: null\nmodel: {dtype: 'off'}\n", "a.yaml")
    kept = {"model": {"dtype": "off"}}
    assert settings_only(tree, ["ema", "probe"]) == kept | {"callbacks": {"ema": None, "probe": None}}
    assert settings_only(tree, []) == kept


#: what stages include is theirs
OUTSIDE_SHARED = [p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "shared"]


@pytest.mark.parametrize("path", sorted(str(p.relative_to(ROOT)) for p in OUTSIDE_SHARED))
def test_stages_alone_name_the_class_of_a_module(path) -> None:
    """What stacks on them says nothing of it: it serves every stage that has its settings, and is refused by others."""
    files = [argument.removeprefix("--config=") for argument in expand([f"--config={path}"])]
    classes = [content_of(file).get("model", {}).get("class_path", "") for file in files]
    assert any(name.startswith("lightning_modules.") for name in classes) is (path in STAGES)
