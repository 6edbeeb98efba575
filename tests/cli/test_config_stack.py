"""The order of configuration files: what one would silently undo of another is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.config_stack import check_stack, config_files
from flow_rl.errors import SettingError
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


def test_files_are_found_in_order() -> None:
    args = ["fit", "--config", "a.yaml", "--run.name=x", "--config=b.yaml", "-c", "c.yaml", "--config"]
    assert list(config_files(args)) == ["a.yaml", "b.yaml", "c.yaml", ""]


def test_stage_first_is_fine() -> None:
    with does_not_raise(SettingError):
        check_stack(["fit", f"--config={TEACHER}", f"--config={FILTER}", "--config=configs/adapter/lora.yaml"])


def test_callbacks_added_before_their_list_are_refused() -> None:
    with pytest.raises(
        SettingError, match=f"would drop those that {FILTER} adds.*--config {TEACHER} --config {FILTER}"
    ):
        check_stack(["fit", f"--config={FILTER}", f"--config={TEACHER}"])


@pytest.mark.parametrize("order", [(TEACHER, STUDENT), (STUDENT, TEACHER)])
def test_two_stages_are_refused(order) -> None:
    with pytest.raises(SettingError, match="A run has one stage") as refused:
        check_stack(["fit", *(f"--config={path}" for path in order)])
    assert str(refused.value).index(order[0]) < str(refused.value).index(order[1])


def test_a_users_variant_of_a_stage_may_replace_it(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {class_path: my_package.Policy}")
    with does_not_raise(SettingError):
        check_stack(["fit", f"--config={TEACHER}", f"--config={tmp_path}/mine.yaml"])


@pytest.mark.parametrize("content", ["a: [1", "just text", "", "model: [1]", "model: {class_path: 3}"])
def test_what_is_no_config_is_left_to_the_parser(content, tmp_path) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with does_not_raise(SettingError):
        check_stack(["fit", f"--config={TEACHER}", f"--config={tmp_path}/bad.yaml", "--config=missing.yaml"])


@pytest.mark.parametrize("path", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.yaml")))
def test_stages_alone_name_the_class_of_a_module(path) -> None:
    """What stacks on them says nothing of it: it serves every stage that has its settings, and is refused by others."""
    text = (ROOT / path).read_text(encoding="utf-8")
    assert ("\n  class_path: lightning_modules." in text) is (path in STAGES)
