"""Greedy tokens and log-probabilities of the core models at every layout against transformers, all in float32."""

import numpy as np
import pytest
from layout_jobs import GREEDY, LAYOUTS, MODELS, NUM_TOKENS, SMOLLM2_PROMPTS, TINY_PROMPTS
from parity import NEAR_TIE, check_completion

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
        near_ties += check_completion(completion, sequence, GREEDY.logprobs, GREEDY.prompt_logprobs)
    record_property("near_ties", near_ties)
    assert near_ties <= MAX_NEAR_TIES


def test_the_random_checkpoints_decide_clearly(greedy_references):
    """Were most margins near ties, the comparison above would prove little."""
    for model in MODELS:
        margins = [np.diff(np.partition(s.rows(), -2, axis=-1)[:, -2:], axis=-1) for s in greedy_references(model)]
        assert np.mean(np.concatenate(margins) < 100 * NEAR_TIE) < 0.1, model
