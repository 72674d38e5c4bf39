"""Greedy tokens and log-probabilities of every model at every layout against transformers, all in float32.

Float32 sums differ in their last digits between layouts, so where the reference's two best tokens are nearer than
NEAR_TIE either may be taken; the reference is then asked along the tokens that were taken.
"""

import numpy as np
import pytest
from layout_jobs import GREEDY, LAYOUTS, MODELS, NUM_TOKENS, SMOLLM2_PROMPTS, TINY_PROMPTS

NEAR_TIE = 1e-4
TOLERANCE = 5e-4  # of log-probabilities
MAX_NEAR_TIES = 2  # over all sequences of a model: more would be a rule, not an accident


@pytest.fixture(scope="session")
def greedy_references(references):
    """name -> the reference's greedy continuation of each prompt; computed once, for all layouts."""
    found = {}

    def of(name):
        if name not in found:
            prompts = SMOLLM2_PROMPTS if name == "smollm2" else TINY_PROMPTS
            found[name] = [references[name].greedy(prompt, NUM_TOKENS) for prompt in prompts]
        return found[name]

    return of


def num_near_ties(token_ids, rows):
    """How many tokens are not the reference's first choice. Fails if one is further from it than a near tie."""
    best = rows.max(-1)
    taken = rows[np.arange(len(token_ids)), token_ids]
    gaps = best - taken
    at = int(gaps.argmax())
    assert gaps[at] < NEAR_TIE, (
        f"token {at} is {token_ids[at]}, {gaps[at]:.2g} below the reference's {rows[at].argmax()}"
    )
    return int((gaps > 0).sum())


def check_logprobs(entries, targets, rows, num_top):
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


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_greedy_equals_transformers(tp, pp, model, layout_results, greedy_references, references, record_property):
    completions = layout_results(tp, pp)[model].runs["greedy"]
    expected = greedy_references(model)
    assert len(completions) == len(expected)
    near_ties = 0
    for completion, sequence in zip(completions, expected, strict=True):
        (choice,) = completion.choices
        assert len(choice.token_ids) == NUM_TOKENS and choice.finish_reason == "length"
        if choice.token_ids != sequence.token_ids:  # then it must be a near tie, seen along the tokens taken
            sequence = references[model].score(sequence.prompt, choice.token_ids)
        near_ties += num_near_ties(choice.token_ids, sequence.rows())
        check_logprobs(choice.logprobs, choice.token_ids, sequence.rows(), GREEDY.logprobs)
        prompt = sequence.prompt
        assert completion.prompt_logprobs[0] is None
        rows = sequence.logprobs[: len(prompt) - 1]
        check_logprobs(completion.prompt_logprobs[1:], prompt[1:], rows, GREEDY.prompt_logprobs)
    record_property("near_ties", near_ties)
    assert near_ties <= MAX_NEAR_TIES


def test_the_random_checkpoints_decide_clearly(greedy_references):
    """Were most margins near ties, the comparison above would prove little."""
    for model in MODELS:
        margins = [np.diff(np.partition(s.rows(), -2, axis=-1)[:, -2:], axis=-1) for s in greedy_references(model)]
        assert np.mean(np.concatenate(margins) < 100 * NEAR_TIE) < 0.1, model
