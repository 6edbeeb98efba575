"""The battery runs in small on a CPU, survives what its checks do, and its checks can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import parity, random_model, teacher_swap
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.bench import Bench, Check, Row
from benchmarks.gpu.breakdown import kind_of
from benchmarks.gpu.naive import apart, guided
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.report import Report
from benchmarks.gpu.runner import Budget, run_checks
from flow_rl.distillation.teacher_slot import TeacherSlot

CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(device=CPU, tiny=True, directory=tmp_path)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", [p if p == "A" else pytest.param(p, marks=pytest.mark.slow) for p in sorted(PARTS)])
def test_every_part_runs_in_small(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, ":4096:8" if name.startswith("CUBLAS") else "1")  # undone afterwards
    assert main(["--part", part, "--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / f"part_{part}.json").read_text(encoding="utf-8"))
    assert report["complete"]
    assert [check["name"] for check in report["checks"]] == [check.name for check in PARTS[part]()]
    for check in report["checks"]:
        assert check["status"] in ("passed", "measured"), check
        assert check["rows"], check["name"]
    tables = (tmp_path / f"part_{part}.md").read_text(encoding="utf-8")
    assert all(f"## {check['name']}: {check['status']}" in tables for check in report["checks"])


def rows(*values: float, limit: float | None = None) -> Callable[[Bench], Iterator[Row]]:
    def run(bench: Bench) -> Iterator[Row]:
        for number, value in enumerate(values):
            limits = {} if limit is None else {"value": limit}
            yield Row(name=f"row {number}", values={"value": value}, limits=limits)

    return run


def then(error: Exception) -> Callable[[Bench], Iterator[Row]]:
    def run(bench: Bench) -> Iterator[Row]:
        yield Row(name="before", values={"value": 1.0})
        raise error

    return run


def statuses(directory: Path) -> dict[str, str]:
    report = json.loads((directory / "part_X.json").read_text(encoding="utf-8"))
    return {check["name"]: check["status"] for check in report["checks"]}


def test_the_battery_goes_on_after_failures_and_says_so(bench: Bench, tmp_path: Path) -> None:
    seen: dict[str, str] = {}

    def look(bench: Bench) -> Iterator[Row]:
        yield Row(name="row", values={"value": 0.0})
        seen.update(statuses(tmp_path))  # what a killed process would leave

    runs = {
        "good": rows(0.0, 1.0, limit=1.0),
        "bad": rows(0.0, 1.1, limit=1.0),
        "nan": rows(float("nan"), limit=1.0),
        "error": then(ValueError("planted")),
        "memory": then(torch.OutOfMemoryError("planted: tried to allocate")),
        "look": look,
    }
    checks = [Check(name=name, question="?", run=run, seconds=1) for name, run in runs.items()]
    assert not run_checks(checks, bench, Budget(60), Report(tmp_path, "X", {}))
    expected = {"good": "passed", "bad": "failed", "nan": "failed", "error": "error", "memory": "out_of_memory"}
    assert seen == expected | {"look": "killed"}
    assert statuses(tmp_path) == expected | {"look": "measured"}
    report = json.loads((tmp_path / "part_X.json").read_text(encoding="utf-8"))
    error = report["checks"][3]
    assert "ValueError: planted" in error["traceback"]
    assert [row["name"] for row in error["rows"]] == ["before"]
    assert report["checks"][1]["reason"] == "Above the limit: row 1: value."


def test_out_of_memory_alone_fails_nothing(bench: Bench, tmp_path: Path) -> None:
    checks = [Check(name="memory", question="?", run=then(torch.OutOfMemoryError("planted")), seconds=1)]
    assert run_checks(checks, bench, Budget(60), Report(tmp_path, "X", {}))


def test_a_row_that_runs_out_of_memory_leaves_the_others(bench: Bench) -> None:
    def measure() -> dict[str, float]:
        raise torch.OutOfMemoryError("planted: tried to allocate\nmore")

    assert bench.row("one", measure, {"error": 0.0}).values["out_of_memory"] == "planted: tried to allocate"
    assert bench.row("one", measure, {"error": 0.0}).broken == []


def test_what_does_not_fit_the_budget_is_skipped_and_smaller_checks_run(tmp_path: Path) -> None:
    checks = [
        Check(name=name, question="?", run=rows(0.0), seconds=seconds)
        for name, seconds in (("large", 100.0), ("small", 5.0))
    ]
    bench = Bench(device=CPU, tiny=False, directory=tmp_path)
    assert run_checks(checks, bench, Budget(50), Report(tmp_path, "X", {}))
    assert statuses(tmp_path) == {"large": "skipped", "small": "measured"}


def test_unknown_checks_and_missing_devices_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path)]
    assert main(["--part", "B", "--only", "speed", *output]) == 2
    assert "no check named speed in part B" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["--part", "B", *output]) == 2
        assert "--device cpu --tiny" in capsys.readouterr().err


def test_parity_sees_weights_that_are_slightly_off(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    load = parity.base

    def off(device: torch.device, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        model = load(device, dtype)
        if dtype == torch.float32:
            with torch.no_grad():
                model.transformer.transformer_blocks[0].attn.to_v.weight.mul_(1.01)
        return model

    monkeypatch.setattr(parity, "base", off)
    broken = {row.name.partition(",")[0] for row in parity.parity(bench) if row.broken}
    assert broken == {"velocity", "gradient"}  # encoders and decoder are as they were


def test_teacher_swap_sees_weights_that_never_came(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bring = TeacherSlot.prefetch

    def only_once(slot: TeacherSlot, key: str) -> None:
        if slot.moves == 0:
            bring(slot, key)

    monkeypatch.setattr(TeacherSlot, "prefetch", only_once)
    assert any(row.broken for row in teacher_swap.teacher_swap(bench))


def test_random_models_keep_tables_in_full_precision() -> None:
    card = random_model.TINY.card
    half, full = (random_model.random_part(card, "transformer", CPU, t) for t in (torch.bfloat16, torch.float32))
    assert half.dtype == torch.bfloat16
    for ours, expected in zip(half.pos_embed.freqs, full.pos_embed.freqs, strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(half.time_text_embed.time_proj.freqs, full.time_text_embed.time_proj.freqs)


def test_the_naive_loop_computes_the_same(bench: Bench) -> None:
    from benchmarks.gpu.evaluations import evaluation, prepare, replace

    model = random_model.random_model(CPU, random_model.TINY)
    for edit in (False, True):
        kept = prepare(bench, model, size=32, edit=edit)
        torch.manual_seed(0)
        anew = replace(prepare(bench, model, size=32, edit=edit, cached=False), latents=kept.latents)
        source = kept.branches.conditional.source_latents
        both = (replace(b, source_latents=source) for b in (anew.branches.conditional, anew.branches.unconditional))
        conditional, unconditional = both
        branches = replace(anew.branches, conditional=conditional, unconditional=unconditional)
        ours = evaluation(model, kept)()
        assert ours.std() > 0
        torch.testing.assert_close(guided(model, apart(replace(anew, branches=branches))), ours, atol=1e-5, rtol=1e-4)


def test_the_battery_needs_no_service_no_renderer_and_no_quantisation() -> None:
    absent = ("pydantic", "bitsandbytes", "fastapi", "uvicorn", "dicebear", "resvg_py")
    script = f"""
import sys
for name in {absent!r}:
    sys.modules[name] = None  # its import fails
from benchmarks.gpu.demo_stages import demo_instructions, demo_rewards
from benchmarks.gpu.parts import PARTS
print(sum(len(checks()) for checks in PARTS.values()), len(demo_rewards("t2i", "edit")), len(demo_instructions()))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["23", "4", "2"]


def test_checks_are_listed_without_an_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--part", "A", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [check.name for check in PARTS["A"]()]


def test_a_run_without_an_output_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--part", "A", "--device", "cpu", "--tiny"])
    assert "--output is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "products"),
        ("sm80_xmma_gemm_f32f32_tf32f32", "products"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "sums"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
            "elementwise",
        ),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("spin", "other"),
    ],
)
def test_kernels_are_sorted_by_their_names(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind
