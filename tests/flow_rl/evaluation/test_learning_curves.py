import math
import re

import pytest
from torch.utils.tensorboard import SummaryWriter

from flow_rl.evaluation.charts import Whisker, line_chart, nice_ticks, whisker_chart
from flow_rl.evaluation.curves import Curve, read_tensorboard_curves


def _log(directory, values: dict[int, float], tag: str = "train/reward") -> None:
    with SummaryWriter(str(directory)) as writer:
        for step, value in values.items():
            writer.add_scalar(tag, value, step)


def test_reads_the_tags_asked_for_in_order(tmp_path):
    _log(tmp_path, {0: 1.0, 10: 2.5, 20: 4.0})
    _log(tmp_path, {5: -1.0}, tag="train/loss")
    loss, reward = read_tensorboard_curves(tmp_path, {"train/loss": "Loss", "train/reward": "Reward"})
    assert (loss.name, list(loss.x), list(loss.y)) == ("Loss", [5], [-1.0])
    assert (reward.name, list(reward.x), list(reward.y)) == ("Reward", [0, 10, 20], [1.0, 2.5, 4.0])


def test_a_resumed_run_overwrites_the_steps_it_repeats(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value, when in ((0, 1.0, 100.0), (1, 2.0, 101.0), (1, 7.0, 200.0), (2, 8.0, 201.0)):
            writer.add_scalar("reward", value, step, walltime=when)
    (curve,) = read_tensorboard_curves(tmp_path, ["reward"])
    assert (list(curve.x), list(curve.y)) == ([0, 1, 2], [1.0, 7.0, 8.0])


def test_all_points_of_a_long_run_are_read(tmp_path):
    _log(tmp_path, dict.fromkeys(range(10_050), 0.5))  # TensorBoard itself would keep 10,000
    assert len(read_tensorboard_curves(tmp_path, ["train/reward"])[0].x) == 10_050


def test_finds_the_one_run_below_a_directory(tmp_path):
    _log(tmp_path / "version_0", {3: 1.0})
    assert read_tensorboard_curves(tmp_path, ["train/reward"])[0].x == [3]
    _log(tmp_path / "version_1", {3: 1.0})
    with pytest.raises(ValueError, match=r"version_0.*version_1"):
        read_tensorboard_curves(tmp_path, ["train/reward"])


def test_unknown_tags_and_places_are_named(tmp_path):
    _log(tmp_path / "run", {0: 1.0})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Did you mean 'train/reward'"):
        read_tensorboard_curves(tmp_path / "run", ["train/rewrad"])
    with pytest.raises(ValueError, match="found: none"):
        read_tensorboard_curves(tmp_path / "empty", ["train/reward"])
    with pytest.raises(ValueError, match="not a directory"):
        read_tensorboard_curves(tmp_path / "missing", ["train/reward"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x": [0, 1], "y": [1.0]}, r"\{'x': 2, 'y': 1\}"),
        ({"x": [0], "y": [1.0], "low": [0.0]}, "both low and high"),
        ({"x": [0, 1], "y": [math.nan, math.nan]}, "no finite value"),
        ({"x": [], "y": []}, "no finite value"),
        ({"x": [math.inf], "y": [1.0]}, "not finite"),
    ],
)
def test_bad_curves_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Curve(name="reward", **fields)


def _polylines(svg: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline class="line" points="([^"]*)"', svg)
    return [[tuple(map(float, point.split(","))) for point in points.split()] for points in found]


def test_line_chart_is_linear_and_points_up():
    (points,) = _polylines(line_chart(Curve(name="r", x=[0, 5, 10], y=[1.0, 2.0, 3.0])))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.11)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.11)
    assert y0 > y1 > y2  # SVG counts downwards


def test_nan_breaks_the_line():
    svg = line_chart(Curve(name="r", x=[0, 1, 2, 3, 4], y=[1.0, 2.0, math.nan, 2.0, 1.0]))
    assert [len(line) for line in _polylines(svg)] == [2, 2]
    assert "nan" not in svg


@pytest.mark.parametrize("fields", [{"x": [3], "y": [0.0]}, {"x": [0, 1], "y": [2.0, 2.0]}])
def test_flat_and_single_point_curves_are_drawn_inside_the_chart(fields):
    (points,) = _polylines(line_chart(Curve(name="r", **fields)))
    assert all(0 < x < 360 and 0 < y < 210 for x, y in points)


def test_ticks_are_round_and_inside():
    assert nice_ticks(-9.8, 12.2) == [-5.0, 0.0, 5.0, 10.0]
    assert nice_ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(2.0, 2.0) == [2.0]


def test_whiskers_sit_where_their_values_are():
    rows = [Whisker(label="a", mean=1.0, low=0.0, high=2.0), Whisker(label="b", mean=4.0, low=3.0, high=8.0)]
    html = whisker_chart(rows, show=lambda value: f"{value:.1f}", reference=0.0)
    low_a, low_b = (float(x) for x in re.findall(r'whisker" x1="([\d.]+)%" x2="[\d.]+%" y1="50%"', html))
    dot_a, dot_b = (float(x) for x in re.findall(r'<circle cx="([\d.]+)%"', html))
    assert (dot_a - low_a) / (dot_b - dot_a) == pytest.approx(1 / 3, abs=1e-3)
    assert float(re.search(r'reference" x1="([\d.]+)%', html)[1]) == low_a
    assert low_b - low_a == pytest.approx(dot_b - dot_a, abs=0.02)
