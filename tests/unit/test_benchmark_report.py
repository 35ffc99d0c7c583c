"""The benchmarks' table and chart."""

import json

from benchmarks import report

COLUMNS = ("kernel", "case", "microseconds", "floor_microseconds", "fraction", "ceiling", "peers", "notes")
ROWS = [
    dict(zip(COLUMNS, row, strict=True))
    for row in (
        ("rms_norm", "a", 2.0, 1.0, 0.5, "copy", {"torch": 9.0}, []),
        ("paged_attention", "b", 4.0, 1.0, 0.25, "read", {"flash-attn": 5.0}, ["torch: RuntimeError: too large"]),
    )
]
RESULT = report.Result({"gpu": "NVIDIA H200"}, {"copy": 4.28e12, "read": 4.35e12, "matmul": 784e12}, ROWS)


def test_the_table_has_the_worst_first_and_a_dash_where_there_is_no_figure(tmp_path):
    header, first, second, note, ceilings = report.table(RESULT).splitlines()
    assert header.split()[-2:] == ["flash-attn", "torch"]
    assert first.split() == ["paged_attention", "b", "4.0", "1.0", "25.0%", "read", "5.0", "-"]
    assert second.split() == ["rms_norm", "a", "2.0", "1.0", "50.0%", "copy", "-", "9.0"]
    assert note == "no figure, paged_attention, b: torch: RuntimeError: too large"
    assert "4.28 TB/s" in ceilings
    assert "784 TFLOP/s" in ceilings
    assert report.draw(RESULT, tmp_path).stat().st_size > 0


def test_without_matplotlib_bars_of_text_are_as_long_as_the_fractions(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)  # what makes an import fail
    path, picture = report.write(RESULT, tmp_path)
    assert report.Result(**json.loads(path.read_text())) == RESULT
    assert picture == tmp_path / "kernels.txt"
    first, second = (tmp_path / "kernels.txt").read_text().splitlines()
    assert first.startswith("paged_attention, b")
    assert (first.count("#"), second.count("#")) == (report.BAR_WIDTH // 4, report.BAR_WIDTH // 2)


HOST = report.HostResult(
    {"gpu": None, "python": "3.12.1", "cpu": "x86_64"},
    [
        {"host": "prepare_decode", "microseconds": 200.0, "yardstick_microseconds": 100.0, "ratios": [2.0]},
        {"host": "append", "microseconds": 50.0, "yardstick_microseconds": 100.0, "ratios": [0.5]},
    ],
)


def test_the_host_side_has_a_table_a_file_and_a_picture_of_its_own(tmp_path):
    """Without a GPU these are all that a run writes."""
    assert report.table(HOST).splitlines()[1].split() == ["prepare_decode", "200.0", "2.00"]
    path, picture = report.write(HOST, tmp_path)
    assert path.name == "host.json"
    assert report.HostResult(**json.loads(path.read_text())) == HOST
    assert picture.stat().st_size > 0
    first, second = report.text_chart(HOST).splitlines()
    assert (first.count("#"), second.count("#")) == (report.BAR_WIDTH, report.BAR_WIDTH // 4)
