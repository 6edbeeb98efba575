"""What a user's reward may return and do: each fault ends in one message with its name, or is undone and said once."""

from __future__ import annotations

import ast
import asyncio
import os
import random
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cli import app
from flow_rl.errors import RunStopped
from flow_rl.rewards import CompositeReward, GuardedReward, Part, Reward, RewardFailure, Samples
from flow_rl.rewards.asking import ask, call, statistics_of, submit
from flow_rl.rewards.background import AsyncReward, ThreadedReward
from flow_rl.rewards.category import CategoryReward
from flow_rl.rewards.surroundings import computes_alone
from flow_rl.rl.phases import PhaseClock
from flow_rl.rl.score_queue import ScoreQueue
from flow_rl.rl.scoring import score_all, score_safely
from tests.planted import Brightness
from tests.toy_policy import toy_rollout

ROOT = Path(__file__).parents[2]
N = 4


class Taste(Reward):
    """Returns what it is given, after it has done what it is given."""

    def __init__(self, value: Any = None, do: Callable[[Samples], Any] = lambda samples: None) -> None:
        self.value, self.do = value, do

    def score(self, samples: Samples) -> Tensor:
        self.do(samples)
        return self.value(samples) if callable(self.value) else self.value


def shown(*, edit: bool = False) -> Samples:
    images = torch.linspace(0, 1, N * 3 * 4 * 5).reshape(N, 3, 4, 5)
    return Samples(
        images=images,
        prompts=[f"prompt {i}" for i in range(N)],
        categories=["plant"] * N,
        sources=images.flip(0).clone() if edit else None,
    )


async def _coroutine() -> Tensor:
    return torch.ones(N)


#: what a reward returns, and words of the message
RETURNED: dict[str, tuple[Any, str]] = {
    "nothing": (None, "returned nothing (None)"),
    "dict": ({"score": [1.0] * N}, "a dict with the keys 'score'"),
    "set": ({1.0, 2.0, 3.0, 4.0}, "a set. Expected"),
    "generator": ((3.0 for _ in range(N)), "a generator"),
    "coroutine": (lambda _: _coroutine(), "must not be `async def`"),
    "future": (lambda _: asyncio.Future(loop=asyncio.new_event_loop()), "must not be `async def`"),
    "text": ("3.0", "the text '3.0'"),
    "long text": ("x" * 10**6, "the text 'xxx"),
    "number": (3.0, "the float 3.0"),
    "bool": (True, "the bool True"),
    "class": (lambda _: Taste, "a ABCMeta"),
    "list of texts": (["3.0"] * N, "a list whose entry 0 is the text '3.0'"),
    "list of bools": ([1.0, True, 2.0, 3.0], "a list whose entry 1 is the bool True"),
    "list of numpy bools": ([1.0, np.bool_(True), 2.0, 3.0], "entry 1 is the bool"),
    "list of lists": ([[1.0], [2.0], [3.0], [4.0]], "a list whose entry 0 has shape (1,)"),
    "list of tensors": ([torch.ones(2)] * N, "a list whose entry 0 has shape (2,)"),
    "list of dicts": ([{"score": 3}] * N, "a list whose entry 0 is a dict"),
    "list of complex": ([1j] * N, "a list whose entry 0 is the complex 1j"),
    "list of huge integers": ([10**400] * N, "scores from inf"),
    "pair": ((torch.ones(N), {"why": "x"}), "a tuple whose entry 0 has shape (4,)"),
    "empty list": ([], "shape (0,) for 4 samples"),
    "short list": ([3.0] * (N - 1), "shape (3,) for 4 samples"),
    "one": (torch.tensor(3.0), "shape () for 4 samples"),
    "column": (torch.ones(N, 1), "Return `scores.squeeze(1)`"),
    "row": (torch.ones(1, N), "Return `scores.squeeze(0)`"),
    "long": (torch.ones(N + 1), "shape (5,) for 4 samples"),
    "square": (torch.ones(N, N), "Reduce it to one score a sample"),
    "numpy column": (np.ones((N, 1)), "shape (4, 1) for 4 samples"),
    "numpy of objects": (np.array([None] * N), "a numpy array of object"),
    "numpy of texts": (np.array(["3"] * N), "a numpy array of <U1"),
    "numpy of bools": (np.ones(N, dtype=bool), "a numpy array of bool"),
    "numpy of complex": (np.ones(N, dtype=complex), "a numpy array of complex128"),
    "tensor of bools": (torch.ones(N, dtype=torch.bool), "a tensor of torch.bool"),
    "tensor of complex": (torch.ones(N, dtype=torch.complex64), "a tensor of torch.complex64"),
    "sparse": (torch.ones(N).to_sparse(), "without plain values (torch.sparse_coo)"),
    "meta": (torch.ones(N, device="meta"), "without plain values (meta)"),
    "quantised": (torch.quantize_per_tensor(torch.ones(N), 0.1, 0, torch.quint8), "without plain values"),
    "infinite": (torch.tensor([1.0, 2.0, torch.inf, 3.0]), "sample 2 of 4 has inf"),
    "infinite below": ([1.0, 2.0, float("-inf"), 3.0], "sample 2 of 4 has -inf"),
    "beyond float32": (torch.full((N,), 1e300, dtype=torch.float64), "scores from inf"),
    "0..1": (torch.linspace(0, 1, N), "scores from 0.000 to 1.000"),
    "integers 0..100": (torch.tensor([80, 90, 100, 3]), "scores from 3.000 to 100.000"),
    "just below": (torch.tensor([0.999, 2.0, 3.0, 4.0]), "sample 0 of 4 has 0.999, 1 are off the scale"),
}


@pytest.mark.parametrize("value, words", RETURNED.values(), ids=RETURNED.keys())  # noqa: PT006
def test_what_is_no_score_is_named(value: Any, words: str) -> None:
    with pytest.raises(RunStopped) as caught:
        score_all({"taste": Taste(value)}, shown())
    told = str(caught.value)
    assert told.startswith("Reward 'taste' returned ")
    assert words in told
    assert "(model.rewards.taste, class tests.bad_inputs.test_rewards.Taste)" in told
    assert "Expected float32 scores, shape (4,), from 1 to 5" in told
    assert len(told) < 600
    assert "\n" not in told


TAKEN: dict[str, Any] = {
    "list": [1.0, 2, None, 4.5],
    "tuple": (1.0, 2, float("nan"), 4.5),
    "list of scalars": [torch.tensor(1.0), np.float32(2), float("nan"), torch.tensor(4.5)],
    "numpy": np.array([1.0, 2.0, np.nan, 4.5]),
    "numpy reversed": np.array([4.5, np.nan, 2.0, 1.0])[::-1],
    "numpy of the other byte order": np.array([1.0, 2.0, np.nan, 4.5], dtype=">f8"),
    "numpy masked": np.ma.array([1.0, 2.0, 3.0, 4.5], mask=[False, False, True, False]),
    "float64": torch.tensor([1.0, 2.0, torch.nan, 4.5], dtype=torch.float64),
    "with gradient": torch.tensor([1.0, 2.0, torch.nan, 4.5], requires_grad=True),
}


@pytest.mark.parametrize("value", TAKEN.values(), ids=TAKEN.keys())
def test_real_numbers_are_taken(value: Any) -> None:
    scores = ask(Taste(value), shown(), "taste")
    assert (scores.dtype, scores.requires_grad) == (torch.float32, False)
    torch.testing.assert_close(scores, torch.tensor([1.0, 2.0, torch.nan, 4.5]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [torch.full((N,), 3.1, dtype=d) for d in (torch.float16, torch.bfloat16)])
def test_coarse_numbers_are_taken_with_a_warning(value: Tensor) -> None:
    with pytest.warns(UserWarning, match=rf"Reward 'taste' returned scores of {value.dtype} .*Compute the score"):
        assert torch.equal(ask(Taste(value), shown(), "taste"), value.float())


def _fail(_: Samples) -> None:
    raise ZeroDivisionError("division by zero")


def _write_numpy(samples: Samples) -> None:
    samples.images.numpy()[0] *= 2


def _mirror_numpy(samples: Samples) -> None:
    pixels = samples.images.numpy()
    pixels[:] = pixels[:, :, :, ::-1].copy()


#: what a reward does, and words of the message
DONE: dict[str, tuple[Callable[[Samples], Any], str]] = {
    "raises": (_fail, r"raised ZeroDivisionError: division by zero at .*test_rewards\.py:\d+ in _fail, while"),
    "asserts": (lambda _: exec("assert False"), "raised AssertionError at"),
    "stops an iteration": (lambda _: next(iter(())), "raised StopIteration"),
    "exits": (lambda _: sys.exit(0), "tried to end the process with status 0"),
    "writes to an image": (lambda s: s.images.mul_(255), "changed the images that it was given"),
    "writes to a view": (lambda s: s.images[1:, 0].zero_(), "changed the images"),
    "writes to a detached image": (lambda s: s.images.detach().clamp_(0.2, 0.8), "changed the images"),
    "writes through data": (lambda s: s.images.data.add_(1), "changed the images"),
    "writes through numpy": (_write_numpy, "changed the images"),
    "mirrors through numpy": (_mirror_numpy, "changed the images"),
    "writes to a source": (lambda s: s.sources.zero_(), "changed the sources"),
    "sorts the prompts": (lambda s: s.prompts.sort(reverse=True), "changed the prompts"),
    "renames a category": (lambda s: s.categories.__setitem__(0, "x"), "changed the categories"),
    "drops a prompt and a pixel": (lambda s: (s.prompts.pop(), s.images.zero_()), "changed the images and prompts"),
}


@pytest.mark.parametrize("do, words", DONE.values(), ids=DONE.keys())  # noqa: PT006
def test_what_cannot_be_undone_stops_the_run(do: Callable[[Samples], Any], words: str) -> None:
    with pytest.raises(RunStopped, match=rf"^Reward 'taste' {words}") as caught:
        score_all({"taste": Taste([3.0] * N, do)}, shown(edit=True))
    assert "(model.rewards.taste, class " in str(caught.value)
    assert "Expected" in str(caught.value)


def test_the_lists_of_the_others_stay_as_they_were() -> None:
    samples = shown()
    with pytest.warns(UserWarning, match="for monitoring only"):
        score_safely({"first": Taste([3.0] * N, lambda s: s.prompts.clear()), "second": Brightness()}, samples)
    assert samples.prompts == [f"prompt {i}" for i in range(N)]


#: what a reward changes in the process, and words of the warning
UNDONE: dict[str, tuple[Callable[[Samples], Any], str]] = {
    "default dtype": (lambda _: torch.set_default_dtype(torch.float64), "torch's default dtype"),
    "default device": (lambda _: torch.set_default_device("meta"), "torch's default device"),
    "grad mode": (lambda _: torch.set_grad_enabled(True), "torch's grad mode"),
    "threads": (lambda _: torch.set_num_threads(2), "torch's number of threads"),
    "matrix products": (lambda _: torch.set_float32_matmul_precision("medium"), "precision of matrix products"),
    "deterministic": (lambda _: torch.use_deterministic_algorithms(True), "deterministic algorithms"),
    "cudnn": (lambda _: setattr(torch.backends.cudnn, "benchmark", True), "cudnn.benchmark"),
    "denormals": (lambda _: torch.set_flush_denormal(False), "flushing of denormals"),
    "numpy errors": (lambda _: np.seterr(divide="raise"), "numpy's handling of errors"),
    "directory": (lambda _: os.chdir("/"), "the working directory"),
    "SIGTERM": (lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN), "the handler of SIGTERM"),
    "SIGINT": (lambda _: signal.signal(signal.SIGINT, lambda *_: None), "the handler of SIGINT"),
    "draws of torch": (lambda _: torch.rand(3), "drew from the global random generator of torch"),
    "draws of numpy": (lambda _: np.random.rand(3), "random generator of numpy"),
    "draws of Python": (lambda _: random.random(), "random generator of Python"),
    "seeds": (lambda _: (torch.manual_seed(5), np.random.seed(5)), "random generator of numpy and torch"),
}


def state() -> tuple[Any, ...]:
    """What a run shares with its rewards."""
    return (
        torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_num_threads(),
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark, float(torch.tensor(2e-38) / 4), np.geterr(), os.getcwd(),
        signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(), random.getstate(),
    )  # fmt: skip


@pytest.mark.parametrize("do, words", UNDONE.values(), ids=UNDONE.keys())  # noqa: PT006
def test_what_can_be_undone_is_and_said(do: Callable[[Samples], Any], words: str) -> None:
    before = state()
    with pytest.warns(UserWarning, match=rf"Reward 'taste' .*{words}.*\(model\.rewards\.taste, class ") as told:
        scores = ask(Taste([3.0] * N, do), shown(), "taste")
    assert torch.equal(scores, torch.full((N,), 3.0))
    assert state() == before
    assert len(told) == 1


def test_a_reward_that_raises_leaves_the_process_as_it_was_too() -> None:
    before = state()

    def do(_: Samples) -> None:
        torch.set_default_dtype(torch.float64)
        raise RuntimeError("later")

    with pytest.raises(RunStopped, match="later"), pytest.warns(UserWarning, match="default dtype"):
        ask(Taste(None, do), shown(), "taste")
    assert state() == before


def test_a_well_behaved_reward_is_asked_without_a_word() -> None:
    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for samples in (shown(), shown(edit=True)):
            ask(Brightness(), samples, "taste")
    assert state() == before


def test_the_draws_of_a_reward_go_on_from_call_to_call_apart_from_the_runs() -> None:
    """Seeded alike, the draws are those of a run in which the reward alone draws, and of one in which none does."""
    torch.manual_seed(3)
    expected = [float(torch.rand(1)) for _ in range(3)]
    torch.manual_seed(3)
    reward = Taste(lambda s: 1 + torch.rand(1).expand(N))
    heard = []
    for own in expected:
        with pytest.warns(UserWarning, match="drew"):
            heard.append(float(ask(reward, shown(), "taste")[0]) - 1)
        assert float(torch.rand(1)) == own
    assert heard == pytest.approx(expected, abs=1e-6)


def test_a_reward_beside_the_run_undoes_nothing_of_it() -> None:
    entered, go = threading.Event(), threading.Event()

    def wait(_: Samples) -> None:
        entered.set()
        assert go.wait(30)

    future = submit(ThreadedReward(Taste([3.0] * N, wait)), shown(), "slow")
    assert entered.wait(30)
    torch.set_default_dtype(torch.float64)
    drawn = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            go.set()
            assert torch.equal(future.result(30), torch.full((N,), 3.0, dtype=torch.float32))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_thread_that_computes_alone_undoes_what_its_rewards_change() -> None:
    """The scoring service has such a thread."""

    def run() -> None:
        computes_alone()
        ask(Taste([3.0] * N, lambda _: torch.set_default_dtype(torch.float64)), shown(), "taste", section="rewards")

    with (
        ThreadPoolExecutor(1) as pool,
        pytest.warns(UserWarning, match=r"'taste' changed torch's default dtype \(rewards\.taste, class"),
    ):
        pool.submit(run).result(30)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("cpu", [True, False])
def test_scores_are_a_copy(cpu: bool) -> None:
    samples, kept = shown(), torch.full((N,), 3.0)
    view = ask(Taste(lambda s: 1 + 0 * s.images[:, 0, 0, 0] if cpu else kept), samples, "taste")
    first = view.clone()
    samples.images.fill_(7)
    kept.fill_(7)
    assert torch.equal(view, first)
    buffer = torch.full((N,), 3.0)
    received = call(Taste(buffer), shown(), "taste")
    buffer.fill_(7)  # while the scores are still waited for
    assert torch.equal(received.result(), torch.full((N,), 3.0))


def test_a_reward_never_builds_a_graph() -> None:
    seen = []
    ask(Taste([3.0] * N, lambda s: seen.append(torch.is_grad_enabled())), shown(), "taste")
    assert seen == [False]


# ------------------------------------------------------------- callers

BAD = {"score": 3.0}


class Later(AsyncReward):
    """Returns what it is given when it is told to."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def submit(self, samples: Samples) -> Future[Tensor]:
        return self.inner


def composite(reward: Reward) -> CompositeReward:
    return CompositeReward({"a": Part(reward=reward, weight=1.0)})


#: a reward around another one, and the setting that the inner one is
AROUND: dict[str, tuple[Callable[[Reward], Reward], str]] = {
    "category": (lambda r: CategoryReward(r, ["plant"]), "init_args.reward"),
    "guarded": (lambda r: GuardedReward(r, "inner"), "init_args.reward"),
    "thread": (ThreadedReward, "init_args.reward"),
    "composite": (composite, "init_args.components.a.reward"),
    "two": (lambda r: composite(CategoryReward(r, ["plant"])), "init_args.components.a.reward.init_args.reward"),
}


@pytest.mark.parametrize("around, setting", AROUND.values(), ids=AROUND.keys())  # noqa: PT006
def test_a_reward_inside_another_is_named_by_its_setting(around: Callable[[Reward], Reward], setting: str) -> None:
    with pytest.raises(RunStopped) as caught:
        ask(around(Taste(BAD)), shown(), "outer")
    assert re.match(r"Reward 'outer' returned a dict", str(caught.value))
    assert f"(model.rewards.outer.{setting}, class " in str(caught.value)


def test_every_caller_checks() -> None:
    rollout = toy_rollout(_prompts(), 2, images=torch.full((2, 3, 4, 4), 0.5))
    with (
        ScoreQueue({"taste": Taste(BAD)}, lambda name, task: True, PhaseClock()) as queue,
        pytest.raises(RunStopped, match="'taste' returned a dict"),
    ):
        queue.put(rollout)
    with pytest.warns(UserWarning, match=r"'taste' returned a dict.*model\.monitors\.taste, class"):
        assert score_safely({"taste": Taste(BAD)}, shown()).isnan().all()
    with pytest.raises(RunStopped, match=r"Reward 'judge/taste' returned a dict.*\(model\.judges\.taste, class"):
        score_all({"judge/taste": Taste(BAD)}, shown())


def test_scores_that_come_later_are_checked_when_they_come() -> None:
    for value, words in ((BAD, "a dict"), (torch.ones(N, 1), r"shape \(4, 1\)"), (torch.zeros(N), "0.000")):
        inner: Future[Any] = Future()
        outer = submit(Later(inner), shown(), "far")
        assert not outer.done()
        inner.set_result(value)
        with pytest.raises(RunStopped, match=rf"Reward 'far' returned .*{words}"):
            outer.result(5)
    failing: Future[Any] = Future()
    failing.set_exception(KeyError("x"))
    with pytest.raises(RunStopped, match="Reward 'far' raised KeyError: 'x'"):
        submit(Later(failing), shown(), "far").result(5)
    own: Future[Any] = Future()
    own.set_exception(RewardFailure("the service is gone"))
    with pytest.raises(RewardFailure, match=r"^the service is gone$"):
        submit(Later(own), shown(), "far").result(5)
    for cancelled in ("inner", "outer"):
        waiting: Future[Any] = Future()
        outer = submit(Later(waiting), shown(), "far")
        (waiting if cancelled == "inner" else outer).cancel()
        assert waiting.cancelled()
        assert outer.cancelled()
    with pytest.raises(RunStopped, match=r"'far' submitted a batch and returned a Tensor.*concurrent\.futures\.Future"):
        submit(Later(torch.ones(N)), shown(), "far")


@pytest.mark.parametrize(
    ("statistics", "words"),
    [
        (None, "returned statistics: None"),
        ([1.0], "returned statistics: a list"),
        ({"parse": "all"}, "statistics with the text 'all' as 'parse'"),
        ({3: 1.0}, "with the float 1.0 as 3"),
        (ZeroDivisionError("x"), "statistics: a ZeroDivisionError"),
    ],
)
def test_statistics_that_are_none_are_left_out_of_the_logs(statistics: Any, words: str) -> None:
    class Talks(Brightness):
        def statistics(self) -> dict[str, float]:
            if isinstance(statistics, Exception):
                raise statistics
            return statistics if not isinstance(statistics, dict) else statistics | {"good": torch.tensor(2.0)}

    with pytest.warns(UserWarning, match=rf"Reward 'taste' .*{words}.*\(model\.rewards\.taste, class"):
        found = statistics_of(Talks(), "taste")
    assert found == ({"good": 2.0} if isinstance(statistics, dict) else {})


def test_a_reward_that_hangs_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flow_rl.rewards.patience.PATIENCE_S", 0.05)
    monkeypatch.setattr("flow_rl.rewards.patience._longest", {})
    said: list[str] = []
    monkeypatch.setattr("flow_rl.rewards.patience.warnings.warn", lambda message, **_: said.append(message))

    def wait_for_a_word(_: Samples) -> None:
        while not said:
            signal.sigtimedwait([], 0.01)

    ask(Taste([3.0] * N, wait_for_a_word), shown(), "slow")
    assert re.match(
        r"Reward 'slow' has been scoring 4 samples for 0\.05 s at .*test_rewards\.py:\d+ in wait_for_a_word "
        r"\(model\.rewards\.slow, class ",
        said[0],
    )


def test_rewards_are_called_in_one_place() -> None:
    """Whoever calls `score` or `submit` of a reward by itself takes what comes back on trust."""
    allowed = {
        ("flow_rl/rewards/asking.py", "reward"),
        ("flow_rl/monitoring/update_direction.py", "module"),  # GRPOPolicy's, of a rollout
        ("flow_rl/rewards/service.py", "self.batcher"),
        ("flow_rl/rewards/face.py", "self.anchors"),
        ("flow_rl/rewards/background.py", "self"),  # `AsyncReward.score`, which is asked itself
        ("flow_rl/rewards/vlm.py", "self"),
    }
    found = set()
    for room in ("flow_rl", "lightning_modules", "callbacks", "cli", "demo", "benchmarks"):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if ".score(" not in text and ".submit(" not in text:
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    whose = ast.unparse(node.func.value)
                    if node.func.attr in ("score", "submit") and not whose.startswith(("super()", "pool", "executor")):
                        found.add((str(path.relative_to(ROOT)), whose))
    assert found <= allowed, sorted(found - allowed)


def _prompts():
    from flow_rl.batches import Prompts

    return Prompts(ids=(1,), texts=("a",), categories=("x",))


# ------------------------------------------------------------- the command line

OWN = """
from flow_rl.rewards import Reward


class Gone(Reward):
    def score(self, samples):
        return {}[samples.prompts[0]]
"""


def test_a_run_ends_in_one_message(
    tmp_path: Path,
    tiny_path: str,
    prompt_files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "own_taste.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_taste", raising=False)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_info:
        app.main(
            [
                "fit",
                "--config=configs/demo/t2i_teacher.yaml",
                f"--model.model_path={tiny_path}",
                "--model.rewards={taste: {class_path: own_taste.Gone}}",
                "--model.reward_weights={taste: 1.0}",
                *(f"--data.{name}={path}" for name, path in prompt_files.items()),
                "--data.prompts_per_step=2",
                f"--run.dir={tmp_path}",
                "--trainer.max_steps=2",
                "--trainer.limit_val_batches=0",
            ]
        )
    told = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: Reward 'taste' raised KeyError: .*own_taste.py:7 in score", line)
    assert "(model.rewards.taste, class own_taste.Gone)" in line
