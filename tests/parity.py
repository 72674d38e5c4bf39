"""Comparing completions with a reference's log-probabilities.

Float32 sums differ in their last digits between layouts, so where the reference's two best tokens are nearer than
NEAR_TIE either may be taken; the reference is then asked along the tokens that were taken.
"""

import numpy as np
from checkpoints import Sequence
from world_scripts.jobs import Completion

NEAR_TIE = 1e-4
TOLERANCE = 5e-4  # of log-probabilities


def num_near_ties(token_ids: list[int], rows: np.ndarray) -> int:
    """How many tokens are not the reference's first choice. Fails if one is further from it than a near tie."""
    best = rows.max(-1)
    taken = rows[np.arange(len(token_ids)), token_ids]
    gaps = best - taken
    at = int(gaps.argmax())
    assert gaps[at] < NEAR_TIE, (
        f"token {at} is {token_ids[at]}, {gaps[at]:.2g} below the reference's {rows[at].argmax()}"
    )
    return int((gaps > 0).sum())


def check_logprobs(entries: list, targets: list[int], rows: np.ndarray, num_top: int) -> None:
    """One position each: the target first, then the num_top most likely, with the reference's values and ranks."""
    assert len(entries) == len(targets) == len(rows)
    for at, (entry, target, row) in enumerate(zip(entries, targets, rows, strict=True)):
        tokens = list(entry)
        assert tokens[0] == target and num_top <= len(tokens) <= num_top + 1, f"position {at}: {entry}"
        for token, (logprob, rank) in entry.items():
            assert abs(logprob - row[token]) < TOLERANCE, (
                f"position {at}, token {token}: {logprob} against {row[token]}"
            )
            # Tokens nearer than the tolerance may stand in either order.
            low, high = 1 + (row > row[token] + TOLERANCE).sum(), (row >= row[token] - TOLERANCE).sum()
            assert low <= rank <= high, f"position {at}, token {token}: rank {rank}, not {low} to {high}"
        ranks = sorted(rank for _, rank in entry.values())
        assert ranks[:num_top] == list(range(1, num_top + 1)), f"position {at}: ranks {ranks}"


def check_completion(completion: Completion, sequence: Sequence, num_top: int, num_prompt_top: int) -> int:
    """A greedy completion against the reference's view of the very same tokens; its near ties."""
    (choice,) = completion.choices
    near_ties = num_near_ties(choice.token_ids, sequence.rows())
    check_logprobs(choice.logprobs, choice.token_ids, sequence.rows(), num_top)
    prompt = sequence.prompt
    assert completion.prompt_logprobs[0] is None
    check_logprobs(completion.prompt_logprobs[1:], prompt[1:], sequence.logprobs[: len(prompt) - 1], num_prompt_top)
    return near_ties
