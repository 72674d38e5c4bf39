"""Tables for a terminal and as Markdown."""

from infer.tables import markdown_table, table

HEADER, ROWS = ["what", "figure"], [["a", "1.0"], ["long name", "22.0"]]


def test_a_table_aligns_numbers_to_the_right() -> None:
    assert table(HEADER, ROWS).splitlines() == ["what       figure", "a             1.0", "long name    22.0"]
    assert table(HEADER, ROWS, left=(0, 1)).splitlines() == ["what       figure", "a          1.0", "long name  22.0"]


def test_a_markdown_table_says_how_columns_are_aligned() -> None:
    assert markdown_table(HEADER, ROWS).splitlines() == [
        "| what | figure |", "| --- | ---: |", "| a | 1.0 |", "| long name | 22.0 |",
    ]  # fmt: skip
    assert markdown_table(HEADER, ROWS, left=(1,)).splitlines()[1] == "| ---: | --- |"
