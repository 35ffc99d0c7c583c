"""tests/DEFECTS.md maps each id to its tests, and the tests are there."""

from tools.defects import ROW, TABLE, covering_tests, written

TEXT = TABLE.read_text(encoding="utf-8")
ROWS = [row for line in TEXT.splitlines() if (row := ROW.match(line))]
IDS = [
    f"D{number:02}"
    for numbers in (range(1, 22), range(30, 40), range(40, 46), range(50, 59), range(60, 73), range(80, 99))
    for number in numbers
]


def test_each_id_has_one_row_and_no_test_names_another():
    assert [row[1] for row in ROWS] == IDS
    assert covering_tests().keys() <= set(IDS)


def test_table_names_the_tests_that_name_the_id():
    assert written(TEXT) == TEXT, "the table and the tests disagree: run `python -m tools.defects`"


def test_each_id_is_covered():
    assert [row[1] for row in ROWS if not row[3].strip()] == []
