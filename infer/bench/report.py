"""What benchmarks share: flags that are numbers, JSON for programs, errors of what they start. No torch here."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ERROR_PREFIX = "infer: error: "  # as launch.fail writes it
LOG_TAIL_LINES = 20


def natural(text: str) -> int:
    """A flag's number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def positive(text: str) -> int:
    """A flag's number of at least 1."""
    if natural(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def output_file(text: str) -> Path:
    """A flag's file that can be written, which is found out before anything is measured."""
    path = Path(text)
    try:
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from None
    return path


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Writes a report to the file of --output-json, if one was given."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")


def child_error(what: str, log: str) -> ValueError:
    """What to raise when a program that was started here failed: its own error, if `log` has one on a line.

    Otherwise the end of the log goes to standard error, for people to read.
    """
    lines = log.splitlines()
    told = [line.removeprefix(ERROR_PREFIX) for line in lines if line.startswith(ERROR_PREFIX)]
    if told:
        return ValueError(f"{what}: {told[-1]}")
    print("\n".join(lines[-LOG_TAIL_LINES:]), file=sys.stderr, flush=True)
    return ValueError(f"{what}; the end of its log stands above")


def slug(name: str) -> str:
    """A file's name: "Intel Xeon Processor @ 2.10GHz" -> "intel-xeon-processor-2.10ghz"."""
    kept = "".join(char if char.isalnum() or char == "." else " " for char in name.lower())
    return "-".join(kept.split())


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values (at least one) are at or below, interpolated as numpy does."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
