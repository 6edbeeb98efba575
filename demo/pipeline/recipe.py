"""The recipe as a list of stages: which command makes what, from which inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.pipeline.stages import Stage
from flow_rl.batches import TASKS

CONFIGS = Path("configs/demo")
#: what the configs of stages include
INCLUDED = (Path("configs/shared"), Path("configs/callbacks"))
BASE = Path("demo/base")
PROMPTS = Path("demo/prompts")
ASSETS = Path("demo/assets")
#: the tiny vision-language model that reward models start from
VLM = Path("demo/vlm")
#: rooms whose code a training run depends on
CODE = tuple(Path(room) for room in ("callbacks", "datamodules", "flow_rl", "lightning_modules"))
#: what makes a teacher train on the curated prompts alone
FILTER = Path("configs/filter/offline.yaml")
#: what can be run: the whole recipe, or the text-to-image teacher alone
SELECTIONS = ("all", "t2i")
#: the base as its users would draw from it: what the student, which needs no guidance, should beat as well
GUIDED_BASE = "base_guided"
GUIDED = ("--model.rollout.guidance.scale=2.5", "--model.rollout.cfg=rollout_only")
#: models that are trained from the base, in the order of the pipeline
TRAINED = ("t2i_teacher", "edit_teacher", "mix_rl", "student")
#: modules of `demo` that decide what an annotation says
_ANNOTATING = (
    "annotation/annotations",
    "annotation/policy_samples",
    "annotation/cases",
    "annotation/damage",
    "annotation/groups",
    "annotation/judgements",
    "world/looks",
)
#: of a quick run
_FEW_PROMPTS = "--data.max_train=400"
_TEST_CONFIGS = {
    "t2i": (CONFIGS / "t2i_teacher.yaml", CONFIGS / "test.yaml"),
    "edit": (CONFIGS / "edit_teacher.yaml", CONFIGS / "test_edit.yaml"),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run of the demo.

    Attributes:
        directory: where everything is written.
        seed: of data order and noise.
        selection: one of `SELECTIONS`.
        quick: everything in small: whether the stages work, not what they can do.
        jobs: stages at a time.
        extra: further arguments of every training, such as `--trainer.max_steps=20`.
    """

    directory: Path
    seed: int = 0
    selection: str = "all"
    quick: bool = False
    jobs: int = 1
    extra: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise ValueError(f"Unknown selection {self.selection!r}, expected one of {list(SELECTIONS)}.")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that are trained and tested."""
        return TASKS if self.selection == "all" else TASKS[:1]

    @property
    def models(self) -> tuple[str, ...]:
        """Models that the report compares, the base first."""
        return ("base", *TRAINED) if self.selection == "all" else ("base", TRAINED[0])

    @property
    def tested(self) -> tuple[str, ...]:
        """Models that are tested; the guided base serves the report's claims alone."""
        return (*self.models, GUIDED_BASE) if self.selection == "all" else self.models

    @property
    def common(self) -> list[str]:
        """Arguments of every command of `train.py`."""
        return [f"--run.dir={self.directory}", f"--run.seed={self.seed}"]

    def model_path(self, model: str) -> Path:
        """Where a model's weights are."""
        return BASE if model in ("base", GUIDED_BASE) else self.directory / model / "export"

    def test_directory(self, model: str, task: str) -> Path:
        """Where a model's scores and images of a task are."""
        return self.directory / f"test_{task}_{model}"


def stages(plan: Plan) -> list[Stage]:
    """The commands of a run, in order."""
    everything = plan.selection == "all"
    made = [*_reward_stages(plan), _curation(plan), _edits(plan)] if everything else []
    made += [_training(plan, model) for model in plan.models if model != "base"]
    return made + [_test(plan, model, task) for task in plan.tasks for model in plan.tested]


def _training(plan: Plan, model: str) -> Stage:
    config, run = CONFIGS / f"{model}.yaml", plan.directory / model
    inputs = [config, *INCLUDED, BASE, PROMPTS, ASSETS, *CODE]
    if model != "t2i_teacher":
        inputs.append(plan.directory / "edits" / "train.jsonl")
    if model == "student":
        inputs += [plan.model_path("t2i_teacher"), plan.model_path("edit_teacher")]
    configs = [config]
    if model == "t2i_teacher" and plan.selection == "all":
        configs.append(FILTER)
        inputs += [FILTER, _curation(plan).output]
    small = ["--trainer.max_steps=12", "--trainer.val_check_interval=6"] if plan.quick else []
    if plan.quick and model == "t2i_teacher":
        small.append(_FEW_PROMPTS)
    return Stage(
        name=model,
        arguments=["train.py", "fit", *_stack(configs), *plan.common, *small, *plan.extra],
        inputs=inputs,
        output=run / "export" / "model_index.json",
        checkpoints=run / "checkpoints",
    )


def _stack(configs: Sequence[Path]) -> list[str]:
    return [f"--config={config}" for config in configs]


def _test(plan: Plan, model: str, task: str) -> Stage:
    configs, run = _TEST_CONFIGS[task], plan.test_directory(model, task)
    small: list[str] = []
    if plan.quick:
        small = ["--data.max_test=60", "--model.test_members=2"]
    elif plan.selection == "all" and task == "t2i":
        small = ["--data.max_test=500"]  # of 1,000: six models are tested, not two
    guidance = GUIDED if model == GUIDED_BASE else ()
    where = [f"--run.name={run.name}", f"--model.model_path={plan.model_path(model)}"]
    data = [plan.directory / "edits" / "test.jsonl"] if task == "edit" else [PROMPTS]
    return Stage(
        name=run.name,
        arguments=["train.py", "test", *_stack(configs), *plan.common, *where, *small, *guidance],
        inputs=[*configs, *INCLUDED, plan.model_path(model), *data, ASSETS, *CODE],
        output=run / "test_scores.jsonl",
    )


def _edits(plan: Plan) -> Stage:
    output = plan.directory / "edits"
    small = ["--count=0.2"] if plan.quick else []
    return Stage(
        name="edits",
        arguments=["-m", "demo.making.edit_prompts", f"--output={output}", *small],
        inputs=[
            Path("demo") / f"{name}.py"
            for name in ("making/edit_prompts", "world/edits", "world/render", "world/vocabulary", "world/world")
        ],
        output=output / "test.jsonl",
    )


def _curation(plan: Plan) -> Stage:
    configs = (CONFIGS / "t2i_teacher.yaml", CONFIGS / "curate.yaml")
    small = ["--curation.members=2", _FEW_PROMPTS] if plan.quick else []
    return Stage(
        name="curation",
        arguments=["train.py", "curate", *_stack(configs), *plan.common, *small],
        inputs=[*configs, *INCLUDED, BASE, PROMPTS, ASSETS, *CODE],
        output=plan.directory / "curation" / "t2i.safetensors",
    )


def _reward_stages(plan: Plan) -> list[Stage]:
    """Annotations, and the reward model that is fine-tuned on them; left out while no small VLM is shipped."""
    annotations = plan.directory / "annotations"
    small = ["--trainer.max_steps=12", "--trainer.val_check_interval=12"] if plan.quick else []
    files = [
        f"--data.{split}_files=[{annotations}/{split}.jsonl,{annotations}/{split}_samples.jsonl]"
        for split in ("train", "validation", "test")
    ]
    return [
        Stage(
            name="annotations",
            arguments=[
                "-m",
                "demo.annotation.annotations",
                f"--output={annotations}",
                *(["--count=0.2"] if plan.quick else []),
            ],
            inputs=[*(Path("demo") / f"{name}.py" for name in _ANNOTATING), BASE, ASSETS],
            output=annotations / "test.jsonl",
            needs=VLM,
        ),
        Stage(
            name="reward",
            arguments=["train.py", "fit", f"--config={CONFIGS / 'reward.yaml'}", *plan.common, *files, *small],
            inputs=[CONFIGS / "reward.yaml", *INCLUDED, VLM, annotations, Path("demo/rubrics"), *CODE],
            output=plan.directory / "reward" / "export",
            checkpoints=plan.directory / "reward" / "checkpoints",
            needs=VLM,
        ),
    ]
