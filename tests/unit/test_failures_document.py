"""docs/failures.md names, for each row of the table in docs/operations.md, tests that exist."""

import ast
import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
NAMED = re.compile(r"`(\w+/test_\w+\.py)::(test_\w+)`")


def table(document: str) -> list[list[str]]:
    """Return the rows of the first table whose first column is "What happens"."""
    lines = (TOP / "docs" / document).read_text().splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("| What happens |"))
    rows = []
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def defined_in(path: Path) -> set[str]:
    return {
        node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    }


def test_every_row_has_its_tests() -> None:
    shown = table("failures.md")
    assert [row[0] for row in shown] == [row[0] for row in table("operations.md")]
    for title, names, _ in shown:
        assert NAMED.sub("", names).replace("<br>", "").strip() == "", title
        assert NAMED.search(names), title


@pytest.mark.parametrize("file", sorted({m[1] for m in NAMED.finditer(str(table("failures.md")))}))
def test_every_test_exists(file: str) -> None:
    named = {m[2] for m in NAMED.finditer(str(table("failures.md"))) if m[1] == file}
    assert named <= defined_in(TOP / "tests" / file)
