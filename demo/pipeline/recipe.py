"""The recipe as a list of stages: which command makes what, from which inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cli.config_stack import expand
from demo.pipeline.agreement import measured_rows
from demo.pipeline.models import BASE_ROW, TEACHERS, VERIFIER, Row, rows_of
from demo.pipeline.stages import Stage
from flow_rl.batches import TASKS

CONFIGS = Path("configs/demo")
BASE = Path("demo/base")
PROMPTS = Path("demo/prompts")
ASSETS = Path("demo/assets")
RUBRICS = Path("demo/rubrics")
#: the tiny vision-language model that reward models start from
VLM = Path("demo/vlm")
#: rooms whose code every run of `train.py` depends on
CODE = tuple(
    Path(room)
    for room in (
        "train.py", "cli", "callbacks", "datamodules", "flow_rl", "lightning_modules", "strategies",
        "demo/scorers", "demo/world",
    )
)  # fmt: skip
#: rooms of the two stages that are no run of `train.py`
ANNOTATING = tuple(Path(room) for room in ("demo/annotation", "demo/scorers", "demo/world", "flow_rl"))
RENDERING = tuple(Path(room) for room in ("demo/making", "demo/world", "flow_rl"))
#: the annotator's verdicts in place of the reward model's
VERIFIER_REWARDS = CONFIGS / "verifier_rewards.yaml"
#: draws without guidance
UNGUIDED = Path("configs/guidance/none.yaml")
#: what can be run: the whole recipe, or a text-to-image teacher alone that needs no reward model
SELECTIONS = ("all", "t2i")
#: models that are trained from the base, in the order of the pipeline
TRAINED = ("t2i_teacher", "edit_teacher", "mix_rl", "student")
_TEST_CONFIGS = {"t2i": CONFIGS / "test.yaml", "edit": CONFIGS / "test_edit.yaml"}
#: of a quick run: fewer prompts, and none of them too flat for rewards that have hardly been trained
_FEW_PROMPTS = 400
_KEEP_ALL = "--callbacks.prompt_filter.init_args.threshold=0"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run of the demo.

    Attributes:
        directory: where everything is written.
        seed: of data order and noise.
        selection: one of `SELECTIONS`.
        upper_bound: also train and test both teachers by the annotator's verifiers.
        quick: everything in small: whether the stages work, not what they can do.
        jobs: stages at a time.
        extra: further arguments of every training, such as `--trainer.max_steps=20`.
    """

    directory: Path
    seed: int = 0
    selection: str = "all"
    upper_bound: bool = False
    quick: bool = False
    jobs: int = 1
    extra: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise ValueError(f"Unknown selection {self.selection!r}, expected one of {list(SELECTIONS)}.")

    @property
    def whole(self) -> bool:
        """Whether the whole recipe is run."""
        return self.selection == "all"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that are trained and tested."""
        return TASKS if self.whole else TASKS[:1]

    @property
    def rows(self) -> tuple[Row, ...]:
        """What is tested, in the order of the report's tables."""
        return rows_of(whole=self.whole, upper_bound=self.upper_bound)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the rows, the base first and the model that the recipe is about last."""
        return tuple(row.name for row in self.rows)

    @property
    def trained(self) -> tuple[str, ...]:
        """Models that this run trains, in the order of the pipeline."""
        verifier = tuple(f"{teacher}{VERIFIER}" for teacher in TEACHERS.values())
        if not self.whole:
            return verifier[:1]
        return TRAINED + (verifier if self.upper_bound else ())

    @property
    def common(self) -> list[str]:
        """Arguments of every command of `train.py`."""
        return [f"--run.dir={self.directory}", f"--run.seed={self.seed}"]

    @property
    def reward_model(self) -> Path:
        """Where the fine-tuned reward model is."""
        return self.directory / "reward" / "export"

    def model_path(self, model: str) -> Path:
        """Where the weights of the base or of a trained model are."""
        return BASE if model == BASE_ROW else self.directory / model / "export"

    def test_directory(self, row: str, task: str) -> Path:
        """Where a row's scores and images of a task are."""
        return self.directory / f"test_{task}_{row}"


def stages(plan: Plan) -> list[Stage]:
    """The commands of a run, in order."""
    made: list[Stage] = []
    if plan.whole:
        made += [*_reward_stages(plan), _edits(plan)]
        made += [_curation(plan, teacher) for teacher in plan.trained if _teacher_task(teacher) is not None]
    made += [_training(plan, model) for model in plan.trained]
    return made + [_test(plan, row, task) for task in plan.tasks for row in plan.rows if task in row.tasks]


def _teacher_task(model: str) -> str | None:
    """The task whose teacher a model is, whatever its rewards; None for other models."""
    by_name = {teacher: task for task, teacher in TEACHERS.items()}
    return by_name.get(model.removesuffix(VERIFIER))


def _rewarded(plan: Plan, model: str) -> tuple[list[Path], list[Path]]:
    """Configs of a model that learns from rewards, and what they read: a teacher's, or those of Mix-RL."""
    configs, inputs = [CONFIGS / f"{model.removesuffix(VERIFIER)}.yaml"], [*CODE, BASE, PROMPTS, ASSETS]
    if model.endswith(VERIFIER):
        configs.append(VERIFIER_REWARDS)
    else:
        inputs += [plan.reward_model, RUBRICS]
    if _teacher_task(model) != "t2i":
        inputs.append(plan.directory / "edits" / "train.jsonl")
    return configs, inputs


def _curated(plan: Plan, model: str) -> tuple[Path, ...]:
    """What the curation of a teacher's prompts makes: their scores, and weights by category."""
    folder = plan.directory / "curation"
    return folder / f"{model}.safetensors", folder / f"{model}_weights.yaml"


def _training(plan: Plan, model: str) -> Stage:
    run, small = plan.directory / model, list[str]()
    if plan.quick:
        small = ["--trainer.max_steps=12", "--trainer.val_check_interval=6"]
    if model == "student":
        configs, inputs = [CONFIGS / "student.yaml"], [*CODE, BASE, PROMPTS, ASSETS]
        inputs += [plan.model_path(teacher) for teacher in TEACHERS.values()]
        inputs.append(plan.directory / "edits" / "train.jsonl")
    else:
        configs, inputs = _rewarded(plan, model)
        if plan.quick:
            small += ["--callbacks.monitor.init_args.every=6", *_few_prompts(model)]
        if plan.whole:
            configs.append(CONFIGS / ("mix_rl_curated.yaml" if model == "mix_rl" else "curated.yaml"))
            teachers = TEACHERS.values() if model == "mix_rl" else [model]
            inputs += [file for teacher in teachers for file in _curated(plan, teacher)]
            small += [_KEEP_ALL] if plan.quick else []
    name = [f"--run.name={model}"] if model.endswith(VERIFIER) else []
    return Stage(
        name=model,
        arguments=["train.py", "fit", *_stack(configs), *plan.common, *name, *small, *plan.extra],
        inputs=[*_files(configs), *inputs],
        output=run / "export" / "model_index.json",
        checkpoints=run / "checkpoints",
    )


def _few_prompts(model: str) -> list[str]:
    """Arguments of a quick run that leave most prompts out; there are few edits to begin with."""
    where = {"t2i": "data", None: "data.t2i"}.get(_teacher_task(model))
    return [] if where is None else [f"--{where}.max_train={_FEW_PROMPTS}"]


def _stack(configs: Sequence[Path]) -> list[str]:
    return [f"--config={config}" for config in configs]


def _files(configs: Sequence[Path]) -> list[Path]:
    """Configs and all that they include."""
    return [Path(argument.removeprefix("--config=")) for argument in expand(_stack(configs))]


def _test(plan: Plan, row: Row, task: str) -> Stage:
    # Where the reward model is compared with the judge, both score. Elsewhere the verifiers are named in place of a
    # reward model that would be loaded and asked.
    compared = plan.whole and row.name in measured_rows(task)
    configs = [CONFIGS / f"{TEACHERS[task]}.yaml", *([] if compared else [VERIFIER_REWARDS]), _TEST_CONFIGS[task]]
    configs += [] if row.guided else [UNGUIDED]
    run, small = plan.test_directory(row.name, task), list[str]()
    if plan.quick:
        small = ["--data.max_test=60", "--model.test_members=2"]
    elif plan.whole and task == "t2i":
        small = ["--data.max_test=500"]  # of 1,000: eight rows are tested, not three
    where = [f"--run.name={run.name}", f"--model.model_path={plan.model_path(row.model)}"]
    data = [plan.directory / "edits" / "test.jsonl"] if task == "edit" else [PROMPTS]
    return Stage(
        name=run.name,
        arguments=["train.py", "test", *_stack(configs), *plan.common, *where, *small],
        inputs=[
            *_files(configs),
            *CODE,
            plan.model_path(row.model),
            *data,
            ASSETS,
            *([plan.reward_model, RUBRICS] if compared else []),
        ],
        output=run / "test_scores.jsonl",
        resumes_from=(run,),  # a test refuses the records of another one
    )


def _edits(plan: Plan) -> Stage:
    output = plan.directory / "edits"
    small = ["--count=0.2"] if plan.quick else []
    return Stage(
        name="edits",
        arguments=["-m", "demo.making.edit_prompts", f"--output={output}", *small],
        inputs=RENDERING,
        output=output / "test.jsonl",
    )


def _curation(plan: Plan, teacher: str) -> Stage:
    """Score the base's rollouts of a teacher's prompts by its rewards, and propose weights by category."""
    configs, inputs = _rewarded(plan, teacher)
    configs.append(CONFIGS / "curate.yaml")
    name = [f"--run.name={teacher}"] if teacher.endswith(VERIFIER) else []
    small = ["--curation.members=2", "--curation.threshold=0", *_few_prompts(teacher)] if plan.quick else []
    made = _curated(plan, teacher)
    return Stage(
        name=f"curation_{teacher}",
        arguments=["train.py", "curate", *_stack(configs), *plan.common, *name, *small],
        inputs=[*_files(configs), *inputs],
        output=made[-1],
        makes=made,
        resumes_from=(made[0], made[0].with_name(f"{made[0].name}.parts")),
    )


def _reward_stages(plan: Plan) -> list[Stage]:
    """Annotations, and the reward model that is fine-tuned on them."""
    annotations, config = plan.directory / "annotations", CONFIGS / "reward.yaml"
    small: list[str] = []
    if plan.quick:
        small = ["--trainer.max_steps=12", "--trainer.val_check_interval=12"]
        # A model that was hardly trained neither ends its reasoning nor is sure of a digit: any score is taken.
        small += [
            "--model.reading.reasoning=false",
            "--model.objective.direct_share=0.5",
            "--model.reading.max_outside=1",
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
            inputs=[*ANNOTATING, BASE, ASSETS],
            output=annotations / "test.jsonl",
        ),
        Stage(
            name="reward",
            arguments=["train.py", "fit", *_stack([config]), *plan.common, *small],
            inputs=[*_files([config]), *CODE, VLM, annotations, RUBRICS],
            output=plan.reward_model,
            checkpoints=plan.directory / "reward" / "checkpoints",
        ),
    ]
