"""The search for stop strings, against the plain definition."""

import random

from infer.serve.stops import StopMatcher


def _plain(stops: list[str], text: str) -> list[tuple[str | None, int]]:
    """For each character: the longest stop string that the text then ends with, and the characters to hold back."""
    found = []
    for end in range(1, len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        begun = [k for stop in stops for k in range(len(stop)) if text[:end].endswith(stop[:k])]
        found.append((max(whole, key=len, default=None), max(begun)))
    return found


def test_every_character_against_the_definition() -> None:
    rng = random.Random(0)
    for _ in range(500):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
        text = "".join(rng.choices("abc", weights=[5, 5, 1], k=30))
        matcher = StopMatcher(stops)
        assert [(matcher.feed(char), matcher.held) for char in text] == _plain(stops, text), (stops, text)


def test_text_that_need_not_be_fed() -> None:
    matcher = StopMatcher(["END"])
    assert not matcher.may_begin("nothing of it")
    assert matcher.may_begin("xE")
    matcher.feed("E")
    assert matcher.may_begin("x")
