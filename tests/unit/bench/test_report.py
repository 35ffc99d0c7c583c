"""report: the table, the JSON file and the picture of a Result."""

import json
import sys

from nanovllm import __version__
from nanovllm.bench import report
from nanovllm.bench.limits import Ceilings, Limit
from nanovllm.bench.report import Result
from nanovllm.bench.session import Percentiles, Repetition, Row
from nanovllm.bench.workload import Scenario

LIMIT = Limit(0.5, 1.5, "matmul", "memory")
RESULT = Result(
    machine={"gpu": None, "cpu": "x86_64", "python": "3.12.1", "torch": "2.13.0"},
    model={"name": "a model", "dtype": "float32"},
    options={"scale": 0.1},
    scenarios={"headline": Scenario(26, (10, 102), (10, 102))},
    ceilings=Ceilings(4.28e12, 784e12),
    rows=[
        Row(
            "headline",
            None,
            26,
            "out",
            tokens_per_second=20836.4,
            limit_tokens_per_second=34900.0,
            fraction=0.597,
            time_to_first_token=Percentiles(0.5, 0.9),
            time_per_output_token=Percentiles(0.01, 0.0123),
            gpu_idle=0.02,
            repetitions=(Repetition(1, 2.0, 10, 40_000, LIMIT), Repetition(2, 2.0, 10, 44_000, LIMIT)),
        ),
        Row(
            "headline",
            2.5,
            26,
            "out",
            tokens_per_second=1000.0,
            limit_tokens_per_second=None,
            fraction=None,
            time_to_first_token=Percentiles(0.05, 0.07),
            time_per_output_token=None,
            gpu_idle=None,
            repetitions=(Repetition(3, 9.0, 10, 9000, None),),
        ),
    ],
)


def test_the_table_has_throughput_and_latencies_and_a_dash_where_there_is_no_figure() -> None:
    lines = report.table(RESULT).splitlines()
    assert all(len(line) <= 100 for line in lines)
    words = [line.split() for line in lines]
    assert words[1] == ["scenario", "requests", "tok/s", "lowest", "highest", "limit", "of", "limit", "GPU", "idle"]
    assert words[2] == ["headline", "26", "20,836", "out", "20,000", "22,000", "34,900", "59.7%", "2.0%"]
    assert words[5] == ["scenario", "requests", "req/s", "tok/s", "first", "token", "p99", "per", "token", "p99"]
    assert words[6] == ["headline", "26", "at", "once", "20,836", "500.0", "900.0", "10.0", "12.3"]
    assert words[7] == ["headline", "26", "2.5", "1,000", "50.0", "70.0", "-", "-"]
    assert lines[9:] == [
        f"a model, float32; x86_64 CPU, torch 2.13.0, Python 3.12.1; nanovllm {__version__}",
        "ceilings of this run: memory 4,280.0 GB/s, matrix product 784 TFLOP/s",
    ]


def test_the_json_file_holds_every_figure_under_the_names_that_the_page_documents(tmp_path) -> None:
    path, picture = report.write(RESULT, tmp_path / "new" / "results")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written) == ["format", "nanovllm", "machine", "model", "options", "scenarios", "ceilings", "rows"]
    assert written["format"] == report.FORMAT == 1
    assert written["scenarios"]["headline"]["input_len"] == [10, 102]
    assert written["ceilings"] == {"memory": 4.28e12, "matmul": 784e12}
    at_once, at_rate = written["rows"]
    assert at_once["time_to_first_token"] == {"median": 0.5, "p99": 0.9}
    assert at_once["repetitions"][1] == {
        "seed": 2,
        "seconds": 2.0,
        "num_input_tokens": 10,
        "num_output_tokens": 44_000,
        "limit": vars(LIMIT),
    }
    assert set(at_rate) == set(at_once) == set(vars(RESULT.rows[0]))
    assert (at_rate["rate"], at_rate["time_per_output_token"], at_rate["fraction"]) == (2.5, None, None)
    assert picture.stat().st_size > 0


def test_the_picture_is_pixels_with_matplotlib_and_the_table_without(tmp_path, monkeypatch) -> None:
    picture = report.draw(RESULT, tmp_path)
    if picture.suffix == ".png":  # matplotlib is an extra
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert report.draw(Result(**{**vars(RESULT), "rows": RESULT.rows[:1]}), tmp_path).name == "bench.png"
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what makes an import fail
    assert report.draw(RESULT, tmp_path) == tmp_path / "bench.txt"
    assert (tmp_path / "bench.txt").read_text(encoding="utf-8") == report.table(RESULT) + "\n"
