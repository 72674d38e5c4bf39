"""LLM in one process: the forms a script gives prompts in, and what it gets back."""

import json
import re
from collections.abc import Iterator

import pytest
from serving import SMOLLM2

from infer import LLM, SamplingParams
from infer.request import StructuredOutputs

GREEDY = SamplingParams(temperature=0, max_tokens=12)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(SMOLLM2, dtype="float32", max_model_len=512, kv_cache_memory_bytes="128M", num_threads=1) as engine:
        yield engine


def test_a_string_its_tokens_and_a_dict_are_the_same_prompt(llm: LLM) -> None:
    text = "The capital of France is"
    tokens = llm.tokenizer.encode(text)
    outputs = llm.generate([text, tokens, {"prompt_token_ids": tokens}], GREEDY, use_tqdm=False)
    assert len({output.outputs[0].text for output in outputs}) == 1
    assert [output.prompt for output in outputs] == [text, None, None]
    assert all(output.prompt_token_ids == tokens and output.finished for output in outputs)
    (single,) = llm.generate(tokens, GREEDY, use_tqdm=False)
    assert single.outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert single.num_cached_tokens == 0, "five tokens fill no block"


def test_chat_renders_the_template(llm: LLM) -> None:
    (one,) = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    assert one.outputs[0].text == "The capital of France is Paris."
    assert (one.outputs[0].finish_reason, one.outputs[0].stop_reason) == ("stop", None)
    assert one.prompt is not None
    assert one.prompt.endswith("<|im_start|>assistant\n")
    both = llm.chat([QUESTION, QUESTION], [GREEDY, SamplingParams(temperature=0, max_tokens=3)], use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in both] == [len(one.outputs[0].token_ids), 3]


def test_a_stop_string_ends_one_choice_and_its_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, stop=["France"], logprobs=1)
    (output,) = llm.chat(QUESTION, params, use_tqdm=False)
    choice = output.outputs[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("The capital of ", "stop", "France")
    assert choice.logprobs is not None
    assert len(choice.logprobs) == len(choice.token_ids) == 4
    assert choice.logprobs[0][choice.token_ids[0]].decoded_token == "The"
    assert choice.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for entry, token in zip(choice.logprobs, choice.token_ids, strict=True))
    )


def test_unseeded_choices_differ_and_seeded_ones_come_again(llm: LLM) -> None:
    free = SamplingParams(n=3, max_tokens=12, temperature=1.5, ignore_eos=True)
    (output,) = llm.generate(["Once"], free, use_tqdm=False)
    assert len({tuple(choice.token_ids) for choice in output.outputs}) == 3
    seeded = SamplingParams(n=2, max_tokens=12, temperature=1.5, seed=7, ignore_eos=True)
    first, second = llm.generate(["Once", "Once"], seeded, use_tqdm=False)
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in second.outputs]


def test_a_request_that_leaves_no_token_says_so(llm: LLM) -> None:
    end = list(llm.engine.model_config.eos_token_ids)
    params = SamplingParams(allowed_token_ids=end, min_tokens=1)
    bad, good = llm.generate(["Hello", "Hello"], [params, GREEDY], use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error"
    assert "no token could be drawn" in (bad.outputs[0].error or "")
    assert good.outputs[0].finish_reason in ("length", "stop")
    llm.engine.scheduler.check_idle()


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        ([], None, None),
        (["Hi", [1] * 512], None, "prompt 1: the prompt has 512 tokens"),
        ([[49152]], None, "prompt 0: the prompt holds token id 49152"),
        ([""], None, "prompt 0: the prompt is empty"),
        ([{"text": "Hi"}], None, "it takes prompt_token_ids alone"),
        ([3.5], None, "prompt 0 must be a string or a list of token ids, not float"),
        (["Hi"], [GREEDY, GREEDY], "1 prompts but 2 sampling_params"),
        (["Hi"], SamplingParams(stop_token_ids=[49152]), "stop_token_ids holds 49152"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(llm: LLM, prompts, params, words) -> None:
    if words is None:
        assert llm.generate(prompts, params, use_tqdm=False) == []
        return
    with pytest.raises(ValueError, match="^.*" + words):
        llm.generate(prompts, params, use_tqdm=False)
    assert not llm.engine.has_work


def test_a_second_llm_is_refused_while_one_is_open(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"an LLM is open in this process; call its close\(\)"):
        LLM(SMOLLM2)


def test_structured_outputs_are_what_was_asked_for(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    wanted = [
        StructuredOutputs(json=schema, disable_any_whitespace=True),
        StructuredOutputs(choice=["Paris", "London"]),
        StructuredOutputs(regex=r"The [a-z]+ is [A-Z][a-z]{2,8}\."),
    ]
    many = [SamplingParams(structured_outputs=one, temperature=t, max_tokens=60) for one in wanted for t in (0.0, 1.0)]
    texts = [output.outputs[0].text for output in llm.chat([QUESTION] * len(many), many, use_tqdm=False)]
    assert [set(json.loads(text)) for text in texts[:2]] == [{"city", "people"}] * 2
    assert set(texts[2:4]) <= {"Paris", "London"}
    assert all(re.fullmatch(r"The [a-z]+ is [A-Z][a-z]{2,8}\.", text) for text in texts[4:])
    llm.engine.scheduler.check_idle()


def test_a_bad_grammar_names_its_prompt_before_anything_runs(llm: LLM) -> None:
    bad = SamplingParams(structured_outputs=StructuredOutputs(regex="(a"))
    with pytest.raises(ValueError, match=r"prompt 1: structured_outputs\.regex: "):
        llm.generate(["Hi", "Hi"], [GREEDY, bad], use_tqdm=False)
    assert not llm.engine.has_work


def test_a_grammar_that_other_parameters_leave_nothing_of_ends_alone(llm: LLM) -> None:
    digit = StructuredOutputs(regex="[0-9]")
    (letter,) = llm.tokenizer.encode("a")
    none_left = SamplingParams(structured_outputs=digit, allowed_token_ids=[letter])
    fine = SamplingParams(structured_outputs=digit)
    bad, good = llm.generate(["1 + 1 =", "1 + 1 ="], [none_left, fine], use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error" and "leave no token" in (bad.outputs[0].error or "")
    assert re.fullmatch("[0-9]", good.outputs[0].text) and good.outputs[0].finish_reason == "stop"


def test_a_finished_text_ends_whatever_the_lengths_and_ends_say(llm: LLM) -> None:
    word = StructuredOutputs(choice=["yes"])
    late = SamplingParams(structured_outputs=word, min_tokens=12, ignore_eos=True)
    endless = SamplingParams(structured_outputs=word, allowed_token_ids=list(range(3, 49152)))
    for output in llm.generate(["Say yes:", "Say yes:"], [late, endless], use_tqdm=False):
        choice = output.outputs[0]
        assert (choice.text, choice.finish_reason, choice.stop_reason) == ("yes", "stop", None)


def test_bad_words_are_not_written(llm: LLM) -> None:
    (plain,) = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    (without,) = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=12, bad_words=["Paris"]), use_tqdm=False)
    assert "Paris" in plain.outputs[0].text and "Paris" not in without.outputs[0].text


def test_priorities_need_their_policy(llm: LLM) -> None:
    with pytest.raises(ValueError, match='scheduling_policy="priority"'):
        llm.generate(["Hi"], GREEDY, use_tqdm=False, priority=[1])
