"""Every sampling parameter has its effect, and gives the same tokens at every layout, alone and among others; prefix
cache, chunked prefill, preemption and aborts change no token."""

import json
import re

import pytest
from checkpoints import EOS, VOCAB_SIZE
from layout_jobs import (
    CASES,
    LAYOUTS,
    LETTERS,
    MAX_MODEL_LEN,
    MAX_TOKENS,
    NUM_ABORTS,
    NUM_REQUESTS,
    REGEX,
    STOP_IDS,
    VARIANTS,
    WORKLOAD_LAYOUTS,
    case_prompts,
)
from tokenizers import Tokenizer

TOLERANCE = 5e-4


def by_case(completions):
    return dict(zip(CASES, completions, strict=True))


@pytest.fixture(scope="module")
def standard(layout_results):
    """Each case by itself on one rank: what all others are compared with."""
    return by_case(layout_results(1, 1)["sampling"].runs["alone"])


@pytest.fixture(scope="module")
def texts(standard):
    return {name: [choice.text for choice in completion.choices] for name, completion in standard.items()}


@pytest.fixture(scope="module")
def tokens(standard):
    """Case -> the tokens of its first choice."""
    return {name: completion.choices[0].token_ids for name, completion in standard.items()}


def check_same(completions, standard):
    different = []
    for name, completion in by_case(completions).items():
        for index, (ours, theirs) in enumerate(zip(completion.choices, standard[name].choices, strict=True)):
            for what in ("token_ids", "text", "finish_reason", "stop_reason"):
                if getattr(ours, what) != getattr(theirs, what):
                    different.append(f"{name}[{index}].{what}: {getattr(ours, what)!r}, not {getattr(theirs, what)!r}")
            if ours.token_ids == theirs.token_ids:
                check_same_logprobs(ours.logprobs, theirs.logprobs, name)
        check_same_logprobs(completion.prompt_logprobs, standard[name].prompt_logprobs, name)
    assert not different, "\n".join(different)


def check_same_logprobs(ours, theirs, name):
    assert (ours is None) == (theirs is None) and len(ours or ()) == len(theirs or ()), name
    for mine, other in zip(ours or (), theirs or (), strict=True):
        assert (mine is None) == (other is None), name
        # Values in their order, not by token: at the end of the list two near ones may have changed places.
        values, others = ([value for value, _ in (entry or {}).values()] for entry in (mine, other))
        assert values == pytest.approx(others, abs=TOLERANCE), name


# ------------------------------------------------------------------------------------------ the same everywhere


@pytest.mark.parametrize("run", ["alone", "mixed"])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_sampling_is_the_same_at_every_layout(tp, pp, run, layout_results, standard):
    check_same(layout_results(tp, pp)["sampling"].runs[run], standard)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_no_engine_setting_changes_a_token(tp, pp, variant, layout_results, standard):
    result = layout_results(tp, pp)[variant]
    check_same(result.runs["mixed"], standard)
    cached = sum(completion.num_cached_tokens for completion in result.runs["mixed"])
    assert (cached > 0) == ("no prefix cache" not in variant), f"{cached} tokens came from the prefix cache"
    assert (result.num_preemptions > 0) == ("few blocks" in variant), f"{result.num_preemptions} preemptions"


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_the_prefix_cache_is_used(tp, pp, layout_results):
    """The second run of the same prompts finds all their full blocks but what a last token needs."""
    mixed = by_case(layout_results(tp, pp)["sampling"].runs["mixed"])
    for name, prompt in zip(CASES, case_prompts(), strict=True):
        whole = 0 if CASES[name].prompt_logprobs is not None else (len(prompt) - 1) // 16 * 16
        if CASES[name].n == 1:  # of several choices the first is told what the others then find
            assert mixed[name].num_cached_tokens == whole, name


@pytest.mark.parametrize(("tp", "pp"), WORKLOAD_LAYOUTS)
def test_a_random_workload(tp, pp, layout_results):
    """Hundreds of requests under preemption, with aborts and without. The script checks that all blocks are free."""
    result = layout_results(tp, pp)["workload"]
    whole, aborts = result.workloads["whole"], result.workloads["aborts"]
    assert result.num_preemptions > 0
    assert len(whole.tokens) == NUM_REQUESTS and not whole.aborted
    assert NUM_ABORTS * 0.5 < len(aborts.aborted) <= NUM_ABORTS
    for name, choices in whole.tokens.items():
        assert [len(tokens) for tokens in choices] == [whole.max_tokens[name]] * len(choices)
        assert whole.finish[name] == ["length"] * len(choices)
        for tokens, others in zip(choices, aborts.tokens[name], strict=True):
            assert others == (tokens[: len(others)] if name in aborts.aborted else tokens), f"request {name}"


def test_a_random_workload_is_the_same_at_both_layouts(layout_results):
    one, four = (layout_results(tp, pp)["workload"].workloads["whole"] for tp, pp in WORKLOAD_LAYOUTS)
    assert one.tokens == four.tokens


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_what_is_not_finite_ends_its_request_and_no_other(tp, pp, layout_results):
    """However it draws, wherever NaN comes up; sound requests beside it and in its blocks after it are as before."""
    runs = layout_results(tp, pp)["poison"].runs
    before = [[choice.token_ids for choice in completion.choices] for completion in runs["before"]]
    assert all(len(tokens) == MAX_TOKENS for choices in before for tokens in choices)
    sound, poisoned = runs["mixed"][1:-2:2], [*runs["mixed"][:-2:2], *runs["mixed"][-2:]]
    for completions in (sound, runs["after"]):
        assert [[choice.token_ids for choice in completion.choices] for completion in completions] == before
        assert all(choice.finish_reason == "length" for completion in completions for choice in completion.choices)
    assert len(poisoned) == len(before) + 2
    for completion in poisoned:
        assert all((choice.finish_reason, choice.token_ids) == ("error", []) for choice in completion.choices)


# ------------------------------------------------------------------------------------------ each has its effect


def test_temperature(tokens):
    assert len({tuple(tokens[name]) for name in ("greedy", "temperature", "seed")}) == 3


def test_seed(tokens):
    assert tokens["seed"] == tokens["seed again"] != tokens["another seed"]
    assert tokens["smallest seed"] and tokens["largest seed"]


def test_truncation_draws_only_what_is_left(standard, references):
    """Every token of a truncated draw stands among those that the reference leaves."""
    prompts = dict(zip(CASES, case_prompts(), strict=True))
    for name in ("top_k", "top_k over the prefix", "top_p", "min_p", "top_k, top_p and min_p"):
        (choice,) = standard[name].choices
        params, rows = CASES[name], references["llama"].score(prompts[name], choice.token_ids).rows()
        for token, row in zip(choice.token_ids, rows, strict=True):
            scaled = row / params.temperature
            probabilities = pow(2.718281828, scaled - scaled.max())
            probabilities /= probabilities.sum()
            better = probabilities > probabilities[token] + 1e-5
            assert better.sum() < (params.top_k or VOCAB_SIZE), f"{name}: token {token} has rank {better.sum() + 1}"
            assert probabilities[better].sum() < params.top_p + 1e-3, f"{name}: token {token} is outside the nucleus"
            assert probabilities[token] > params.min_p * probabilities.max() - 1e-5, f"{name}: token {token}"


def test_penalties(tokens):
    """A bias makes one token win; the penalties take it away again, once seen or with every repetition."""
    assert tokens["presence_penalty"].count(20) > tokens["frequency_penalty"].count(20) >= 1
    negative = tokens["negative frequency_penalty"]
    assert len(set(negative)) < len(negative) / 2, "a negative penalty invites repetition"
    shared = dict(zip(CASES, case_prompts(), strict=True))["greedy"]
    seen = set(shared)
    assert tokens["greedy"] != tokens["repetition_penalty"]
    repeated = [
        token
        for i, token in enumerate(tokens["repetition_penalty"])
        if token in seen.union(tokens["repetition_penalty"][:i])
    ]
    assert len(repeated) <= 1


def test_logit_bias(tokens):
    assert tokens["logit_bias forces"] == [17] * MAX_TOKENS
    assert min(tokens["logit_bias bans"]) >= 900


def test_allowed_token_ids(tokens):
    for name in ("allowed_token_ids", "allowed_token_ids, greedy"):
        assert set(tokens[name]) <= set(CASES[name].allowed_token_ids)
    assert len(set(tokens["allowed_token_ids"])) > 1


def test_bad_words(tokens):
    assert 20 not in tokens["bad_words"] and 21 in tokens["bad_words"]
    assert (21, 21) not in zip(tokens["bad_words"], tokens["bad_words"][1:], strict=False)


def test_structured_outputs(standard, texts):
    (text,) = texts["json"]
    value = json.loads(text)
    assert list(value) == ["n", "s"] and value["n"] in (1, 20, 300) and len(value["s"]) <= 3
    for text, choice in zip(texts["regex"], standard["regex"].choices, strict=True):
        assert re.fullmatch(REGEX, text) and choice.token_ids[-1] == EOS
    assert texts["choice"][0] in ("Yes", "No", "Maybe")
    (choice,) = standard["grammar"].choices
    assert re.match(r"\(*x?\)*", choice.text).end() == len(choice.text) > 0
    if choice.finish_reason == "stop":
        assert choice.text.count("(") == choice.text.count(")")
    for name in ("json", "regex", "choice"):
        assert {(choice.finish_reason, choice.stop_reason) for choice in standard[name].choices} == {("stop", None)}


def test_stop_strings(standard, texts):
    (stopped,), (included,), (late,) = (standard[n].choices for n in ("stop", "stop included", "stop after min_tokens"))
    assert stopped.finish_reason == included.finish_reason == late.finish_reason == "stop"
    assert stopped.stop_reason in LETTERS and not set(stopped.text) & set(LETTERS)
    assert included.text == stopped.text + stopped.stop_reason
    assert stopped.token_ids == included.token_ids
    assert len(late.token_ids) > 9 and late.stop_reason in LETTERS


def test_stop_token_ids(standard, checkpoint_dirs):
    tokenizer = Tokenizer.from_file(str(checkpoint_dirs["llama"] / "tokenizer.json"))
    (early,), (late,) = standard["stop_token_ids"].choices, standard["stop_token_ids after min_tokens"].choices
    for choice in (early, late):
        assert choice.finish_reason == "stop" and choice.stop_reason == choice.token_ids[-1] in STOP_IDS
        assert not set(choice.token_ids[:-1]) & set(STOP_IDS)
        assert choice.text == tokenizer.decode(choice.token_ids[:-1])  # the stop token counts, but is not shown
    assert len(late.token_ids) > 15


def test_end_token(standard, texts):
    (ended,), (late,), (ignored,) = (
        standard[name].choices for name in ("end token", "end token after min_tokens", "ignore_eos")
    )
    assert ended.token_ids == [EOS] and ended.finish_reason == "stop" and ended.stop_reason is None
    assert len(late.token_ids) == 5 and late.token_ids[-1] == EOS and EOS not in late.token_ids[:-1]
    assert ignored.token_ids == [EOS] * MAX_TOKENS and ignored.finish_reason == "length" and ignored.text == ""
    assert texts["special tokens shown"] == ["<|end|>" * 3]


def test_lengths(standard, tokens):
    assert len(tokens["max_tokens"]) == 1
    prompt = dict(zip(CASES, case_prompts(), strict=True))["to the end of the model"]
    assert len(prompt) + len(tokens["to the end of the model"]) == MAX_MODEL_LEN
    assert standard["to the end of the model"].choices[0].finish_reason == "length"


def test_choices(standard):
    drawn = [tuple(choice.token_ids) for choice in standard["n"].choices]
    assert len(set(drawn)) == 3 and {len(tokens) for tokens in drawn} == {MAX_TOKENS}
    first, second = standard["n, greedy"].choices
    assert first.token_ids == second.token_ids


def test_logprobs(standard):
    (choice,) = standard["logprobs"].choices
    for token, entry in zip(choice.token_ids, choice.logprobs, strict=True):
        assert next(iter(entry)) == token and len(entry) in (5, 6)
    (alone,) = standard["logprobs of the drawn alone"].choices
    assert all(list(entry) == [token] for token, entry in zip(alone.token_ids, alone.logprobs, strict=True))
    prompt = dict(zip(CASES, case_prompts(), strict=True))["prompt_logprobs"]
    entries = standard["prompt_logprobs"].prompt_logprobs
    assert entries[0] is None and [next(iter(entry)) for entry in entries[1:]] == prompt[1:]
    assert standard["greedy"].prompt_logprobs is None and standard["greedy"].choices[0].logprobs is None


def test_no_detokenize(standard, texts):
    assert texts["no detokenize"] == [""] and len(standard["no detokenize"].choices[0].token_ids) == MAX_TOKENS
