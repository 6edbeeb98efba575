"""Prompts longer than a generator reads, and names that logs cannot bear: refused before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import app
from cli.data_checks import prompts_fit_generator
from datamodules import PromptDataModule
from flow_rl.models.prompt_tokens import count_tokens, load_tokenizer, most_tokens
from flow_rl.models.qwen_image import QwenImage
from flow_rl.models.qwen_image_21 import QwenImage21
from flow_rl.models.tiny.qwen_image import build_pipeline_v1
from flow_rl.names import RESERVED, check_names, why_no_name
from flow_rl.planning.setup import Setup
from tests.toy_policy import Brightness, toy_policy

BASE = "demo/base"
START = " ".join(["a potted succulent in a round red pot on a wooden table"] * 120)


def files(directory: Path, *texts: str) -> dict[str, str]:
    """Prompt files; the given texts are the training prompts."""
    contents = {"train": texts, "validation": ["one"], "test": ["two"]}
    for first, (name, prompts) in enumerate(contents.items()):
        rows = [{"id": 100 * first + i, "prompt": text, "category": "x"} for i, text in enumerate(prompts)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {f"{name}_file": str(directory / f"{name}.jsonl") for name in contents}


def complaints(path: str, directory: Path, *texts: str, limit: int | None = None) -> list[str]:
    data = PromptDataModule(**files(directory, *texts), prompts_per_step=1)
    policy = toy_policy(path, max_prompt_tokens=limit)
    return list(prompts_fit_generator(Setup(model=policy, data=data, trainer={})))


def test_a_prompt_without_end_is_named_with_its_line_and_tokens(tiny_path: str, tmp_path: Path) -> None:
    long = "a red pot " * 2000
    (found,) = complaints(tiny_path, tmp_path, "a pot", long, "a jug")
    (count,) = count_tokens(load_tokenizer(Path(tiny_path)), [long])
    assert found.startswith(f"{tmp_path}/train.jsonl, line 2: the prompt with id 1 has {count} tokens")
    assert "takes 1024. Shorten it, or raise model.max_prompt_tokens (1024)." in found
    assert complaints(tiny_path, tmp_path, "a pot", long, limit=count) == []
    assert len(complaints(tiny_path, tmp_path, long, limit=count - 1)) == 1
    many = complaints(tiny_path, tmp_path, *(f"{i} {long}" for i in range(30)))
    assert len(many) == 21
    assert many[-1] == "... and 10 more prompts that are too long."


def test_what_a_family_cuts_cannot_be_allowed(tmp_path: Path) -> None:
    """Two prompts that differ behind the 512th token are one to Qwen-Image v1, and two to the rewards."""
    build_pipeline_v1([START] * 3).save_pretrained(tmp_path / "v1")
    found = complaints(str(tmp_path / "v1"), tmp_path, "a pot", START, limit=2000)
    assert "model.max_prompt_tokens is 2000, and a QwenImagePipeline reads 512 tokens" in found[0]
    assert "train.jsonl, line 2: the prompt with id 1 has" in found[1]
    assert found[1].endswith("takes 512. Shorten it.")
    model = QwenImage(build_pipeline_v1([START] * 3), image_size=(32, 32))
    with pytest.raises(ValueError, match=r"The prompt 'a potted .* tokens, and the generator reads at most 512"):
        model.encode(["a pot", f"{START} and a blue bird"])


def test_the_count_is_what_the_first_family_gives_its_transformer() -> None:
    texts = ["a red pot", "\n\nline", " lead", "trail \n", "Käfer 🙂", ""]
    pipeline = build_pipeline_v1(texts * 3)
    # The pipeline drops as many tokens as the released tokenizer makes of the system message; a tiny one makes more.
    head = pipeline.prompt_template_encode.split("{}")[0]
    pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer(head)["input_ids"])
    encoded = QwenImage(pipeline, image_size=(32, 32)).encode(texts)
    assert count_tokens(pipeline.tokenizer, texts) == [len(e) for e in encoded.embeds]


def test_the_setting_reaches_the_generator(tiny_path: str, tiny_model: QwenImage21) -> None:
    policy = toy_policy(tiny_path, max_prompt_tokens=20)
    policy.limit_prompts(tiny_model)
    with pytest.raises(ValueError, match="the generator reads at most 20"):
        tiny_model.encode(["a red pot " * 20])
    with pytest.raises(ValueError, match=r"model\.max_prompt_tokens is 0; it must be above 0"):
        toy_policy(tiny_path, max_prompt_tokens=0)


def test_a_model_that_is_not_here_is_warned_of(tmp_path: Path) -> None:
    data = PromptDataModule(**files(tmp_path, START), prompts_per_step=1)
    setup = Setup(model=toy_policy(BASE), data=data, trainer={})
    generator = replace(setup.profile.generator, model_path="Qwen/Qwen-Image-2.1")
    setup.__dict__["profile"] = replace(setup.profile, generator=generator)
    with pytest.warns(UserWarning, match="tokenizer of 'Qwen/Qwen-Image-2.1' is not on this machine"):
        assert list(prompts_fit_generator(setup)) == []


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_no_prompt_has_more_tokens_than_the_bound(text: str) -> None:
    """The bound lets most prompts pass without a tokenizer, so it must never be too low."""
    assert count_tokens(TOKENIZERS.setdefault(BASE, load_tokenizer(Path(BASE))), [text])[0] <= most_tokens(text)


TOKENIZERS: dict[str, object] = {}

NAMES = {
    "a number": (7, "it must be a text, received 7"),
    "null": (None, "it must be a text, received None"),
    "nothing": ("", "it is blank"),
    "a blank": (" ", "it is blank"),
    "zero width": ("\u200b", "it is blank"),
    "a blank before": (" x", "begins or ends with a blank"),
    "a slash": ("a/b", "holds a slash"),
    "a backslash": ("a\\b", "holds a slash"),
    "a line break": ("a\nb", "a tab or a line break"),
    "a NUL": ("a\0b", r"the control character U\+0000"),
    "the parent directory": ("..", "is a directory to every file system"),
    "a novel": ("x" * 101, "has 101 characters"),
    **{word: (word, f"'{word}' is reserved") for word in RESERVED},
}


@pytest.mark.parametrize("given", NAMES)
def test_a_name_that_means_something_else_is_refused(given: str) -> None:
    name, words = NAMES[given]
    with pytest.raises(ValueError, match=rf"^model\.rewards has a name that can't be used: .*{words}"):
        check_names("model.rewards", ["good", name])


@pytest.mark.parametrize("setting", ["rewards", "monitors", "judges"])
def test_scorers_are_checked_by_their_names(tiny_path: str, setting: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.{setting} has a name that can't be used: 'mean' is reserved"):
        toy_policy(tiny_path, **{setting: {"mean": Brightness()}})


@pytest.mark.parametrize("name", ["Gary Marcus et al.", "portrait", "文字", "e-mail", "Mean", "edit", "t2i", "a:b"])
def test_other_words_are_names(name: str) -> None:
    assert why_no_name(name) is None


def test_the_doctor_lists_all_faults_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = files(tmp_path, "a pot", "a jug")
    row = {"id": 7, "prompt": "half \ud83d", "category": "mean"}
    Path(given["train_file"]).write_text("".join(json.dumps(row | {"id": i}) + "\n" for i in range(30)))
    Path(given["test_file"]).unlink()
    config = ["--config=configs/demo/t2i_teacher.yaml", "--config=configs/demo/verifier_rewards.yaml"]
    line = [*config, f"--run.dir={tmp_path}/runs", *(f"--data.{name}={path}" for name, path in given.items())]
    with pytest.raises(SystemExit, match="2"):
        app.main(["doctor", "--data", *line])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "error: 31 faults in the data:" in said
    assert all(f"train.jsonl, line {i}: 'prompt' holds half a character" in said for i in range(1, 31))
    assert f"31. No file '{given['test_file']}'" in said
    files(tmp_path, "a pot", "a jug")
    app.main(["doctor", "--data", *line, "--data.prompts_per_step=1"])
    said = capsys.readouterr().out
    assert f"data.train_file '{given['train_file']}' (t2i): 2 of 2 rows in use, 1 categories" in said
    assert said.endswith("The data are sound.\n")
