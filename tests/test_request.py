"""SamplingParams and prompts: what is refused, and in which words."""

import math

import msgspec
import numpy as np
import pytest

from infer.request import FinishReason, SamplingParams, StructuredOutputs, check_prompt


def test_the_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert params.stop_strings == [] and not params.greedy and params.detokenize and params.skip_special_tokens


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("n", 0, "n must be an integer from 1 to 1024, not 0"),
        ("n", 1.5, "n must be an integer"),
        ("n", True, "n must be an integer from 1 to 1024, not True"),
        ("temperature", -0.1, "temperature must be from 0 to 100, not -0.1"),
        ("temperature", math.nan, "temperature must be from 0 to 100, not nan"),
        ("temperature", math.inf, "temperature must be .*inf"),
        ("temperature", "hot", "temperature must be .*'hot'"),
        ("temperature", None, "temperature must be .*None"),
        ("top_p", 0.0, "top_p must be over 0 and at most 1, not 0.0"),
        ("top_p", 1.01, "top_p must be over 0 and at most 1, not 1.01"),
        ("top_k", -2, "top_k must be an integer of at least -1, not -2"),
        ("min_p", 1.5, "min_p must be from 0 to 1, not 1.5"),
        ("seed", 2**63, f"seed must be an integer from {-(2**63)} to {2**63 - 1}, not {2**63}"),
        ("presence_penalty", 2.1, "presence_penalty must be from -2 to 2"),
        ("frequency_penalty", -2.1, "frequency_penalty must be from -2 to 2"),
        ("repetition_penalty", 0, "repetition_penalty must be over 0"),
        ("max_tokens", 0, "max_tokens must be an integer of at least 1, not 0"),
        ("min_tokens", 17, r"min_tokens must be at most max_tokens \(16\), not 17"),
        ("min_tokens", -1, "min_tokens must be an integer of at least 0, not -1"),
        ("logprobs", -1, "logprobs must be an integer from 0 to 1024, not -1"),
        ("prompt_logprobs", 1025, "prompt_logprobs must be an integer from 0 to 1024, not 1025"),
        ("stop", "", "stop must hold non-empty strings, not ''"),
        ("stop", ["a", 3], "stop must hold non-empty strings, not 3"),
        ("stop", ["x"] * 65, "stop may hold 64 strings, not 65"),
        ("stop_token_ids", [-1], "stop_token_ids entries must be an integer of at least 0, not -1"),
        ("stop_token_ids", ["a"], "stop_token_ids entries must be .*'a'"),
        ("allowed_token_ids", [], "allowed_token_ids must name at least one token"),
        ("allowed_token_ids", [1.0], "allowed_token_ids entries must be"),
        ("logit_bias", {5: 101}, r"logit_bias\[5\] must be from -100 to 100, not 101"),
        ("logit_bias", {"5": 1}, "logit_bias keys must be .*'5'"),
        ("ignore_eos", 1, "ignore_eos must be true or false, not 1"),
        ("skip_special_tokens", "no", "skip_special_tokens must be true or false, not 'no'"),
        ("spaces_between_special_tokens", 0, "spaces_between_special_tokens must be true or false, not 0"),
        ("bad_words", "word", "bad_words must be a list of strings, not 'word'"),
        ("bad_words", ["ok", " "], "bad_words must hold strings that are not blank, not ' '"),
        ("bad_words", [3], "bad_words must hold strings that are not blank, not 3"),
        ("bad_words", ["x"] * 1001, "bad_words may hold 1000 strings, not 1001"),
        ("bad_words", ["x" * 40_000] * 2, "bad_words must have 1 to 65536 bytes, not 80000"),
        ("structured_outputs", {"regex": "a"}, "structured_outputs must be a StructuredOutputs, not {'regex': 'a'}"),
    ],
)
def test_a_wrong_value_is_named(name, value, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**{name: value})


def test_the_ends_of_every_range_are_fine():
    SamplingParams(
        n=1024, temperature=100, top_p=1, top_k=-1, min_p=1, seed=2**63 - 1, presence_penalty=-2, frequency_penalty=2,
        repetition_penalty=100, max_tokens=1, min_tokens=1, logprobs=1024, prompt_logprobs=0, stop=["x"] * 64,
        logit_bias={0: -100, 1: 100}, allowed_token_ids=[0],
    )  # fmt: skip
    SamplingParams(seed=-(2**63), max_tokens=None, min_tokens=10**6, temperature=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "takes exactly one of json, regex, choice, grammar, json_object; it has none of them"),
        ({"json_object": False}, "takes exactly one of .* none of them"),
        ({"regex": "a", "choice": ["a"]}, "takes exactly one of .*; it has regex and choice"),
        ({"structural_tag": "{}"}, "structural_tag is not supported; use json, regex"),
        ({"json": {"a": {1, 2}, "b": object()}}, "json must be a JSON schema"),
        ({"json": 5}, "json must be a string, not int"),
        ({"json": "x" * (256 * 1024 + 1)}, "json must have 1 to 262144 bytes, not 262145"),
        ({"regex": ""}, "regex must have 1 to 65536 bytes, not 0"),
        ({"regex": "é" * 40_000}, "regex must have 1 to 65536 bytes, not 80000"),
        ({"grammar": "\ud800"}, "grammar holds .*half a surrogate pair"),
        ({"choice": []}, "choice must hold 1 to 1024 strings, not 0"),
        ({"choice": "ab"}, "choice must be a list of strings, not 'ab'"),
        ({"choice": ["a", ""]}, "choice must hold non-empty strings, not ''"),
        ({"choice": ["a"] * 1025}, "choice must hold 1 to 1024 strings, not 1025"),
        ({"json_object": 1}, "json_object must be true or false, not 1"),
        ({"regex": "a", "disable_any_whitespace": True}, "go with json, not with regex"),
    ],
)
def test_structured_outputs_name_what_is_wrong(given, words):
    with pytest.raises(ValueError, match=words):
        StructuredOutputs(**given)


def test_a_schema_keeps_the_order_of_its_keys():
    """They are written in the order that the model must write them in."""
    structured = StructuredOutputs(json={"properties": {"b": {}, "a": {}}})
    assert (structured.json, structured.kind) == ('{"properties":{"b":{},"a":{}}}', "json")
    deep = schema = {}
    for _ in range(5000):
        deep["a"] = {}
        deep = deep["a"]
    with pytest.raises(ValueError, match="json"):
        StructuredOutputs(json=schema)


def test_stop_strings_need_text():
    with pytest.raises(ValueError, match="stop strings need detokenize=True"):
        SamplingParams(stop="a", detokenize=False)
    assert SamplingParams(stop="a").stop_strings == ["a"]
    assert SamplingParams(stop=["a", "b"]).stop_strings == ["a", "b"]


def test_an_unknown_parameter_is_refused():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)
    with pytest.raises(msgspec.ValidationError, match="best_of"):
        msgspec.convert({"best_of": 2}, SamplingParams)


def test_parameters_from_json_are_checked_too():
    with pytest.raises(msgspec.ValidationError, match="top_p"):
        msgspec.json.decode(b'{"top_p": 2.0}', type=SamplingParams)
    assert msgspec.json.decode(b'{"logit_bias": {"7": 1.5}}', type=SamplingParams).logit_bias == {7: 1.5}


def test_parameters_do_not_change():
    with pytest.raises(AttributeError):
        SamplingParams().n = 2


def test_tiny_temperatures_are_greedy():
    assert SamplingParams(temperature=0).greedy and SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=2e-5).greedy


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
def test_tokens_outside_the_vocabulary(name):
    SamplingParams(**{name: [99]}).check_vocabulary(100)
    with pytest.raises(ValueError, match=f"{name} holds 100; the vocabulary has ids 0 to 99"):
        SamplingParams(**{name: [100]}).check_vocabulary(100)
    with pytest.raises(ValueError, match="logit_bias holds 100"):
        SamplingParams(logit_bias={100: 1.0}).check_vocabulary(100)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "the prompt is empty; it needs at least one token"),
        ([1] * 16, "the prompt has 16 tokens; this model takes at most 15"),
        ([1, 100], "the prompt holds token id 100; the vocabulary has ids 0 to 99"),
        ([1, -1], "the prompt holds token id -1"),
    ],
)
def test_prompts_that_cannot_run(prompt, words):
    with pytest.raises(ValueError, match=words):
        check_prompt(prompt, SamplingParams(), vocab_size=100, max_model_len=16)


def test_prompts_that_can():
    check_prompt([0, 99] + [5] * 13, SamplingParams(), vocab_size=100, max_model_len=16)
    with pytest.raises(ValueError, match="stop_token_ids holds 100"):
        check_prompt([1], SamplingParams(stop_token_ids=[100]), vocab_size=100, max_model_len=16)


def test_finish_reasons_read_as_openai_writes_them():
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "abort", "error"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": np.float64(0.7)}, 0.7),
        ({"allowed_token_ids": range(3)}, [0, 1, 2]),
        ({"stop_token_ids": {5: "a", 6: "b"}.keys()}, [5, 6]),
        ({"stop": ("a", np.str_("b"))}, ["a", "b"]),
        ({"stop": "a"}, ["a"]),
        ({"logit_bias": {1: np.float64(2)}}, {1: 2.0}),
        ({"bad_words": ("a", "b c")}, ["a", "b c"]),
        ({"structured_outputs": StructuredOutputs(choice=("a", "b"))}, StructuredOutputs(choice=["a", "b"])),
    ],
)
def test_what_the_constructor_takes_can_travel(given, kept):
    params = SamplingParams(**given)
    (name,) = given
    assert getattr(params, name) == kept
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert again == params


@pytest.mark.parametrize(
    "given",
    [
        {"stop": 5},
        {"stop": "\ud800"},
        {"stop_token_ids": 5},
        {"stop_token_ids": "5"},
        {"stop_token_ids": [2**31]},
        {"logit_bias": [1]},
        {"logit_bias": {2**40: 1.0}},
        {"max_tokens": 10**20},
        {"top_k": 10**20},
        {"min_tokens": 10**20},
    ],
)
def test_what_cannot_travel_is_refused_by_name(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        SamplingParams(**given)
