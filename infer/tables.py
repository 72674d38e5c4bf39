"""Tables for a terminal and as Markdown. Standard library only."""

from collections.abc import Collection, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Columns under a header, two blanks between them; those whose numbers are in `left` hold words."""
    columns = []
    for number, column in enumerate(zip(header, *rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.ljust(width) if number in left else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """The same as Markdown."""
    lines = [header, ["---" if number in left else "---:" for number in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
