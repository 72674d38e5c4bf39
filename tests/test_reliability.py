"""docs/reliability.md promises nothing that no test shows."""

import ast
import re

from worlds import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text()


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 50 and len(named) == PAGE.count("`tests/"), "one is not named as FILE::TEST"
    for path, name in named:
        functions = {n.name for n in ast.parse((ROOT / path).read_text()).body if isinstance(n, ast.FunctionDef)}
        assert name in functions, f"{path} has no test {name}"


def test_every_row_of_the_page_names_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "shown by" not in line]
    assert len(rows) > 25
    for row in rows:
        assert row.count("|") == 4 and "::test_" in row.rpartition("| `")[2], row
