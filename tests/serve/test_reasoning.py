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
    ("qwen3", "", "\nhi</think>", "", "\nhi</think>"),
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
    (StructuredOutputs(grammar='start: "x" tail\ntail: "y" | "}" // {\n'), "x}", "xz"),
]


@pytest.mark.parametrize("asked,good,bad", CONSTRAINTS, ids=[asked.kind for asked, _, _ in CONSTRAINTS])
def test_a_constraint_holds_for_the_answer_alone(accepts, asked, good, bad):
    r1, qwen, thinks = PARSERS["deepseek_r1"](), PARSERS["qwen3"](), "Let {me} see.\n\n<b>\n"
    free = constrain_answer(asked, r1, ())
    assert accepts(free, f"{thinks}</think>\n\n{good}") and accepts(free, f"<think>\n{thinks}</think>{good}")
    assert not accepts(free, f"{thinks}</think>{bad}") and not accepts(free, good)
    optional = constrain_answer(asked, qwen, ())
    assert accepts(optional, good) and accepts(optional, f"<think>{thinks}</think>\n{good}")
    assert not accepts(optional, bad) and not accepts(optional, f"{thinks}</think>{good}")
    assert constrain_answer(asked, PARSERS["qwen3"](CLOSED), ()) is asked


def test_tags_that_are_special_tokens(accepts):
    """The test tokenizer has no think tags; another of its special tokens stands for one."""
    asked = StructuredOutputs(choice=["yes"])
    plain = constrain_answer(asked, PARSERS["deepseek_r1"](), ("<think>", "</think>"))
    swapped = plain.grammar.replace("</think>", "<|im_end|>").replace("<think>", "<|im_start|>")
    special = StructuredOutputs(grammar=swapped)
    assert accepts(special, "<|im_start|>hm</think><|im_end|>\nyes") and accepts(special, "hm<|im_end|>yes")
    assert not accepts(special, "hm<|im_end|>no")


def test_a_constraint_too_long_for_a_grammar_is_refused():
    asked = StructuredOutputs(json={"enum": ["x" * 100_000]})
    with pytest.raises(ValueError, match="json after reasoning: grammar must have 1 to"):
        constrain_answer(asked, PARSERS["deepseek_r1"](), ())
