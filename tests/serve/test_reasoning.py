"""Reasoning parsers, and constraints that hold only for the answer after the reasoning."""

import pytest

from infer.request import StructuredOutputs
from infer.serve.reasoning import PARSERS, constrain_answer, parser_class
from infer.structured import compile_grammar, load_tokenizer

OPENED, CLOSED = "<assistant>\n<think>\n", "<assistant>\n<think>\n\n</think>\n\n"
CASES = [  # parser, prompt, text -> reasoning, content
    ("deepseek_r1", "", "<think>\nhm\n\nso\n</think>\n\nhi\n", "hm\n\nso", "hi\n"),
    ("deepseek_r1", "", "hm</think>hi", "hm", "hi"),
    ("deepseek_r1", OPENED, "a < b, a\n<b\n</think>hi</think>", "a < b, a\n<b", "hi</think>"),
    ("deepseek_r1", OPENED, "cut off\n</thi", "cut off\n</thi", ""),
    ("deepseek_r1", CLOSED, "hi <think>", "", "hi <think>"),
    ("deepseek_r1", OPENED, "", "", ""),
    ("qwen3", "", "<think>hm</think>hi", "hm", "hi"),
    ("qwen3", "", "\n<think>hm", "hm", ""),
    ("qwen3", "", "hm\n</think>\n\nhi</think>", "", "hm\n\n\nhi</think>"),  # a closing tag alone is no content
    ("qwen3", "", "hm <think>so</think>hi", "", "hm <think>so</think>hi"),
    ("qwen3", CLOSED, "hi</think>", "", "hi</think>"),
    ("qwen3", "", "a < b </thin", "", "a < b </thin"),
    ("qwen3", "", "<thin", "", "<thin"),
    ("qwen3", OPENED, "hm\n</think>\n\n\nhi", "hm", "hi"),
    ("qwen3", CLOSED, "hi", "", "hi"),
]


@pytest.mark.parametrize("name,prompt,text,reasoning,content", CASES)
def test_reasoning_is_taken_out_however_the_text_comes(name, prompt, text, reasoning, content):
    cuts = [[text], list(text), *([text[:cut], text[cut:]] for cut in range(1, len(text)))]
    for pieces in cuts:
        parser = parser_class(name)(prompt)
        found = [parser.feed(piece) for piece in pieces] + [parser.finish()]
        assert ("".join(part[0] for part in found), "".join(part[1] for part in found)) == (reasoning, content), pieces


@pytest.mark.parametrize("text", ["hm <b>\n\n<tool_call>\n{}</think>", "<tool_call>\n{}</think>"])
def test_a_call_ends_the_thinking_where_models_forget_to(text):
    thought, call = text.split("<tool_call>")
    for pieces in ([text], list(text)):
        for name, opening, expected in (
            ("qwen3", "<tool_call>", (thought.rstrip("\n"), "<tool_call>" + call)),
            ("qwen3", None, (text.removesuffix("</think>"), "")),
            ("deepseek_r1", "<tool_call>", (text.removesuffix("</think>"), "")),
        ):
            parser = parser_class(name)(OPENED, "", opening)
            found = [parser.feed(piece) for piece in pieces] + [parser.finish()]
            assert ("".join(part[0] for part in found), "".join(part[1] for part in found)) == expected


def test_a_continued_message_says_where_it_is():
    for continued, expected in (("<think>hm", ("so", "")), ("<think>hm</think>", ("", "so")), ("text", ("", "so"))):
        parser = parser_class("qwen3")("... " + continued, continued)
        first, last = parser.feed("so"), parser.finish()
        assert (first[0] + last[0], first[1] + last[1]) == expected


def test_nothing_waits_longer_than_it_must():
    parser = parser_class("deepseek_r1")("")
    assert parser.feed("one\n") == ("one", "")
    assert parser.feed("two</thin") == ("\ntwo", "")
    assert parser.feed("k>") == ("", "")
    assert parser.feed("answer") == ("", "answer")


def test_unknown_parsers_are_named():
    with pytest.raises(ValueError, match="known are deepseek_r1, qwen3"):
        parser_class("o1")


@pytest.fixture(scope="module")
def accepts(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)

    def check(asked, text):
        matcher = compile_grammar(asked, tokenizer)
        tokens = tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return check


CONSTRAINTS = [
    (StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "integer"}}}), '{"a": 1}', "{a}"),
    (StructuredOutputs(json_object=True, disable_any_whitespace=True), '{"a":[1]}', '{"a" : 1}'),
    (StructuredOutputs(regex=r"[a-z]+/\d\n?"), "ab/1", "ab-1"),
    (StructuredOutputs(choice=['ye"s', "no\\"]), 'ye"s', "yes"),
    (StructuredOutputs(choice=["a\x7f", "b\n\u2028"]), "a\x7f", "a"),
    (StructuredOutputs(json='{"type": "integer", "x-guidance": 5}'), "7", "x"),
    (StructuredOutputs(grammar='start: "x" tail\ntail: "y" | "}" // {\n'), "x}", "xz"),
]


@pytest.mark.parametrize("asked,good,bad", CONSTRAINTS, ids=[asked.kind for asked, _, _ in CONSTRAINTS])
def test_a_constraint_holds_for_the_answer_alone(accepts, asked, good, bad):
    r1, qwen, thinks = PARSERS["deepseek_r1"](), PARSERS["qwen3"](), "Let {me} see.\n\n<b>\n"
    free = constrain_answer(asked, r1, {})
    assert accepts(free, f"{thinks}</think>\n\n{good}") and accepts(free, f"<think>\n{thinks}</think>{good}")
    assert not accepts(free, f"{thinks}</think>{bad}") and not accepts(free, good)
    optional = constrain_answer(asked, qwen, {})
    assert accepts(optional, good) and accepts(optional, f"<think>{thinks}</think>\n{good}")
    assert not accepts(optional, bad) and not accepts(optional, f"{thinks}</think>{good}")
    assert constrain_answer(asked, PARSERS["qwen3"](CLOSED), {}) is asked
    assert constrain_answer(asked, None, {}) is asked


def test_tags_that_are_special_tokens(accepts):
    """The test tokenizer has no think tags; others of its special tokens stand for them."""
    asked = StructuredOutputs(choice=["yes"])
    special = constrain_answer(asked, PARSERS["deepseek_r1"](), {"<think>": 1, "</think>": 2})
    assert accepts(special, "<|im_start|>hm</think><|im_end|>\nyes") and accepts(special, "hm<|im_end|>yes")
    assert not accepts(special, "hm<|im_end|>no")


def test_a_call_in_place_of_the_answer(accepts):
    asked = StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    plain = constrain_answer(asked, None, {}, ("<tool_call>", "</tool_call>"))
    assert accepts(plain, '{"a": 1}') and accepts(plain, "<tool_call>\n{}</tool_call>\n<tool_call>")
    assert not accepts(plain, '{"b": 1}') and not accepts(plain, "I look. <tool_call>{}")
    tokens = constrain_answer(asked, None, {"[TOOL_CALLS]": 1, "[ARGS]": 2}, ("[TOOL_CALLS]", "[ARGS]"))
    assert accepts(tokens, '{"a": 1}') and accepts(tokens, '<|im_start|>f<|im_end|>{"n"\n}<|im_start|>')
    assert not accepts(tokens, "[TOOL_CALLS]f")
    thinking = constrain_answer(asked, PARSERS["deepseek_r1"](), {}, ("<tool_call>",))
    assert accepts(thinking, "hm</think>\n\n<tool_call>{") and accepts(thinking, 'hm</think>{"a": 1}')
    assert not accepts(thinking, "hm</think>no")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "true", "[]"])
def test_what_is_no_schema_is_said(text):
    with pytest.raises(ValueError, match=r"json (is not JSON|is nested too deeply|must be a schema that is an)"):
        constrain_answer(StructuredOutputs(json=text), PARSERS["deepseek_r1"](), {})


def test_formats_that_only_describe_are_left_out(accepts):
    asked = StructuredOutputs(json={"type": "string", "format": "password"})
    assert accepts(constrain_answer(asked, PARSERS["deepseek_r1"](), {}), 'hm</think>"x"')


def test_a_constraint_too_long_for_a_grammar_is_refused():
    asked = StructuredOutputs(json={"enum": ["x" * 100_000]})
    with pytest.raises(ValueError, match="json after reasoning: grammar must have 1 to"):
        constrain_answer(asked, PARSERS["deepseek_r1"](), {})
