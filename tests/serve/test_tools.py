"""Tool-call parsers: what they find, however the text is divided; and the schemas that force calls."""

import json
import random
import re
import sys

import pytest
from llguidance import LLMatcher

from infer.request import StructuredOutputs
from infer.serve.tools import (
    PARSERS,
    ContentDelta,
    NamedParser,
    RequiredParser,
    ToolDelta,
    ToolParser,
    make_parser,
    named_schema,
    required_schema,
)  # fmt: skip
from infer.serve.tools.json_text import MAX_DEPTH, JsonScanner, is_json
from infer.serve.tools.source import Source
from infer.structured import compile_grammar, load_tokenizer

PARAMETERS = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"}, "s": {"type": "string"}, "o": {"type": ["object", "null"]},
        "b": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "a": {"type": "array"}, "x": {"type": "number"},
    },
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("f", "g")]

# parser, text -> content, [(name, arguments)]
CASES = [
    # Hermes
    ("hermes", "just <b>text</b> < tool", "just <b>text</b> < tool", []),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"s": "x"}}\n</tool_call>', "", [("f", '{"s": "x"}')]),
    (
        "hermes", 'Two:\n<tool_call>{"name": "f", "arguments": {"s": "</tool_call>\\n\\"}"}}</tool_call>\n'
        '<tool_call>{"arguments": {"n": [1, {"k": null}]}, "id": 7, "name": "g"}</tool_call>\n\n',
        "Two:\n", [("f", '{"s": "</tool_call>\\n\\"}"}'), ("g", '{"n": [1, {"k": null}]}')],
    ),
    ("hermes", '<tool_call>{"name": "f"}</tool_call> and so on', " and so on", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"n\\": 1}"}</tool_call>', "", [("f", '{"n": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ("hermes", "<tool_call>call f</tool_call>", "<tool_call>call f</tool_call>", []),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}', '<tool_call>{"name": 5, "arguments": {}}', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}x', '<tool_call>{"name": "f", "arguments": [1]}x', []),
    ("hermes", '<tool_call>{nam<tool_call>{"name": "f"}</tool_call>', "<tool_call>{nam", [("f", "{}")]),
    (  # broken inside its arguments: they come out as written, without the object's own bracket
        "hermes", '<tool_call>\n{"name": "f", "arguments": {"s": "a "b" c"}}\n</tool_call> ok', " ok",
        [("f", '{"s": "a "b" c"}')],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "cut o', "", [("f", '{"s": "cut o')]),
    ("hermes", '<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
    # Half a surrogate pair is no text: as a name, or where arguments would have to be written anew
    ("hermes", r'<tool_call>{"name": "\ud800"}', r'<tool_call>{"name": "\ud800"}', []),
    (
        "hermes", r'<tool_call>{"name": "f", "arguments": "{\"s\": \"\ud800\"}"}',
        r'<tool_call>{"name": "f", "arguments": "{\"s\": \"\ud800\"}"}', [],
    ),
    ("hermes", r'<tool_call>{"name": "\ud83d\ude00", "arguments": {"s": "\ud800"}}', "", [("😀", r'{"s": "\ud800"}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"n": 1.5e3}', "", [("f", '{"n": 1.5e3}')]),
    # Llama 3
    ("llama3_json", '{"name": "f", "parameters": {"n": 1}}', "", [("f", '{"n": 1}')]),
    (
        "llama3_json", '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}; {"name": "g", "arguments": '
        '{"s": ";{"}}', "", [("f", "{}"), ("g", '{"s": ";{"}')],
    ),
    ("llama3_json", 'Sure.\n {"name": "f", "parameters": {}} done', "Sure.\n  done", [("f", "{}")]),
    ("llama3_json", '{"name": "Paris", "size": 2}', '{"name": "Paris", "size": 2}', []),
    ("llama3_json", '{"name": "Paris"}', '{"name": "Paris"}', []),
    ("llama3_json", 'as {"name": "f", "parameters": {}}', 'as {"name": "f", "parameters": {}}', []),
    ("llama3_json", '<|python_tag|>print("x")', '<|python_tag|>print("x")', []),
    ("llama3_json", "{{{}", "{{{}", []),
    ("llama3_json", r'{"name": "\udfff", "parameters": {}}', r'{"name": "\udfff", "parameters": {}}', []),
    (  # the line break is content, and a line begins after it
        "llama3_json", '{"name": "f", "parameters": {}}x{\n{"name": "g", "parameters": {}}', "x{\n",
        [("f", "{}"), ("g", "{}")],
    ),
    ("llama3_json", '{"name": "f", "parameters": {"n": oops', "", [("f", '{"n": oops')]),
    # Mistral
    (
        "mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"n": 1}}, {"arguments": {}, "name": "g"}]', "",
        [("f", '{"n": 1}'), ("g", "{}")],
    ),
    ("mistral", 'Hm [TOOL_CALLS]f{"n": 1}[TOOL_CALLS]g[ARGS]{}', "Hm ", [("f", '{"n": 1}'), ("g", "{}")]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]abc123456[ARGS]{"s": "[ARGS]"}', "", [("f", '{"s": "[ARGS]"}')]),
    ("mistral", '[TOOL_CALLS]f{"n": x}[TOOL_CALLS]g{}', "", [("f", '{"n": x'), ("g", "{}")]),
    ("mistral", "[TOOL_CALLS] what?", "[TOOL_CALLS] what?", []),
    ("mistral", "[TOOL_CALLS]f{x[TOOL_CALLS], y", "[TOOL_CALLS], y", [("f", "{x")]),
    ("mistral", r'[TOOL_CALLS][{"name": "\ud800"}]', r'[TOOL_CALLS][{"name": "\ud800"}]', []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}, 5]', ", 5]", [("f", "{}")]),
    ("mistral", "a [list], [TOOL", "a [list], [TOOL", []),
    # Qwen 3 Coder
    (
        "qwen3_coder",
        "I see.\n<tool_call>\n<function=f>\n<parameter=s>\n\n a \"q\" < b\n</parameter>\n<parameter=n>\n12\n"
        "</parameter>\n<parameter=o>\n{'k': [True]}\n</parameter>\n</function>\n</tool_call>\n", "I see.\n",
        [("f", '{"s": "\\n a \\"q\\" < b", "n": 12, "o": {"k": [true]}}')],
    ),
    (
        "qwen3_coder", "<function=f><parameter=b>True</parameter><parameter=o>null<parameter=a>[1</parameter>"
        "<parameter=x>1e3</parameter><parameter=?>7</parameter></function>", "",
        [("f", '{"b": true, "o": null, "a": "[1", "x": 1e3, "?": "7"}')],
    ),
    ("qwen3_coder", "<tool_call><function=g></function></tool_call>", "", [("g", "{}")]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n</tool_call>ok", "ok", [("f", "{}")]),
    ("qwen3_coder", "<tool_call>hm</tool_call>", "<tool_call>hm</tool_call>", []),
    ("qwen3_coder", "if a <function= b:\n", "if a <function= b:\n", []),
    ("qwen3_coder", "<function=f><parameter=s>\nab\n", "", [("f", '{"s": "ab')]),
    ("qwen3_coder", "<function=f><parameter=n>\n12", "", [("f", '{"n": \n12')]),
    (
        "qwen3_coder", r"<function=f><parameter=a>['\ud800', 'é']</parameter></function>", "",
        [("f", r'{"a": ["\ud800", "\u00e9"]}')],
    ),
    # Pythonic
    (
        "pythonic", '[f(n=-1, s="a)]\\n", a=[1, (2,)], o={"k": None}), g()]', "",
        [("f", '{"n": -1, "s": "a)]\\n", "a": [1, [2]], "o": {"k": null}}'), ("g", "{}")],
    ),
    (
        "pythonic", "Yes:\n<|python_start|>[f(s='''it's''', b=true)]<|python_end|>", "Yes:\n",
        [("f", '{"s": "it\'s", "b": true}')],
    ),
    ("pythonic", '[f(s="")]', "", [("f", '{"s": ""}')]),
    ("pythonic", r'[f(s="\ud800", a={"\udfff": 1})]', "", [("f", r'{"s": "\ud800", "a": {"\udfff": 1}}')]),
    ("pythonic", "[1] and [x](y)", "[1] and [x](y)", []),
    ("pythonic", "see [f(n=1)]", "see [f(n=1)]", []),
    ("pythonic", "[f(1)]", "[f(1)]", []),
    ("pythonic", "[f(n=open('x'))]", "[f(n=open('x'))]", []),
    ("pythonic", "[f(n=1), g(n=", ", g(n=", [("f", '{"n": 1}')]),
    ("pythonic", "[f(n=1e999)]", "[f(n=1e999)]", []),
    # Forced by tool_choice
    (
        "required", '[{"name": "f", "parameters": {"n": 1}}, {"name": "g", "parameters": {}}]', "",
        [("f", '{"n": 1}'), ("g", "{}")],
    ),
    ("required", '[{"name": "f", "parameters": {"n"', "", [("f", '{"n"')]),
    ("required", "no", "no", []),
    ("named", '{"n": 1}', "", [("f", '{"n": 1}')]),
    ("named", "", "", []),
]  # fmt: skip


def parser_of(name: str) -> ToolParser:
    match name:
        case "required":
            return RequiredParser()
        case "named":
            return NamedParser("f")
        case _:
            return make_parser(name, TOOLS)


def parse(name: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = parser_of(name)
    content, names, arguments, ids = "", [], [], set()
    for delta in [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish():
        if isinstance(delta, ContentDelta):
            delta.text.encode()  # else no reply could hold it
            content += delta.text
            continue
        if delta.index == len(names):
            assert delta.name and delta.id and delta.id not in ids
            ids.add(delta.id)
            names.append(delta.name)
            arguments.append("")
        else:
            assert delta.index == len(names) - 1 and delta.name is None and delta.id is None
        arguments[delta.index] += delta.arguments
        (names[delta.index] + delta.arguments).encode()
    assert parser.num_calls == len(names)
    return content, list(zip(names, arguments, strict=True))


def divisions(text: str, rng: random.Random) -> list[list[str]]:
    found = [list(text), *([text[:cut], text[cut:]] for cut in range(1, len(text)))]
    for _ in range(10):
        cuts = sorted(rng.sample(range(len(text) + 1), min(5, len(text))))
        found.append([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])
    return found


@pytest.mark.parametrize("name,text,content,calls", CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)])
def test_calls_are_found_however_the_text_comes(name, text, content, calls):
    assert parse(name, [text]) == (content, calls)
    for pieces in divisions(text, random.Random(0)):
        assert parse(name, pieces) == (content, calls), pieces


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_calls_never_fail_and_lose_no_word(name):
    """Deletes, doubles and swaps characters of good texts: the division into pieces still changes nothing."""
    rng = random.Random(name)
    texts = [text for case, text, _, _ in CASES if case == name]
    for _ in range(400):
        text = list(rng.choice(texts) + rng.choice(["", " Zebra ", "\n"]) + rng.choice(texts))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + 1] = rng.choice(["", text[at] * 2, rng.choice('{}[]"<>\\(),=\n'), "é"])
        damaged = "".join(text)
        whole = parse(name, [damaged])
        assert parse(name, list(damaged)) == whole, damaged
        if " Zebra " in damaged:
            assert "Zebra" in json.dumps(whole), damaged


def test_forced_calls_have_ids_of_the_models_format():
    for parser in (RequiredParser(make_id=PARSERS["mistral"].new_id), NamedParser("f", PARSERS["mistral"].new_id)):
        [call, *_] = parser.feed('[{"name": "f", "parameters": {}}]')
        assert len(call.id) == 9 and call.id.isalnum()
    assert RequiredParser().feed('[{"name": "f", "parameters": {}}]')[0].id.startswith("call_")


def test_nothing_waits_longer_than_it_must():
    parser = make_parser("hermes", TOOLS)
    assert parser.feed("Hello <") == [ContentDelta("Hello ")]
    assert parser.feed("b> ") == [ContentDelta("<b> ")]
    assert parser.feed('<tool_call>{"name": "f", "argu') == []
    [head] = parser.feed('ments": {"s": "first ')
    assert (head.index, head.name, head.arguments) == (0, "f", '{"s": "first ')
    assert parser.feed("second") == [ToolDelta(0, "second")]
    assert parser.feed('"}') == [ToolDelta(0, '"}')]
    assert parser.feed("}</tool_call>") == parser.finish() == []
    coder = make_parser("qwen3_coder", TOOLS)
    assert coder.feed("<tool_call>\n<function=f>\n")[0].name == "f"
    assert coder.feed("<parameter=s>\nab\n") == [ToolDelta(0, '"s": "ab')]  # the newline may be the closing tag's
    assert coder.feed("c<") == [ToolDelta(0, "\\nc")]
    python = make_parser("pythonic", TOOLS)
    assert python.feed("[f(n=1") == []
    assert [delta.name for delta in python.feed(")") if isinstance(delta, ToolDelta)] == ["f"]


def test_ids():
    ids = {make_parser("hermes", []).feed('<tool_call>{"name": "f"}')[0].id for _ in range(20)}
    assert len(ids) == 20 and all(one.startswith("call_") for one in ids)
    ids = {make_parser("mistral", []).feed("[TOOL_CALLS]f{}")[0].id for _ in range(20)}
    assert len(ids) == 20 and all(len(one) == 9 and one.isalnum() for one in ids)


@pytest.mark.parametrize(
    "name,text",
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"s": ' + "[" * 40_000),
        ("hermes", "<tool_call>{" * 10_000),
        ("llama3_json", "{" * 40_000),
        ("llama3_json", '{"name": "f", "parameters": {x' + "} ]" * 50_000),
        ("mistral", "[TOOL_CALLS]" * 10_000),
        ("pythonic", "[f(a=" + "(" * 40_000),
        ("pythonic", "[f(a=" + "-" * 40_000 + "1)]"),
        ("pythonic", "[f(a=" + "9" * 40_000 + ")]"),
        ("pythonic", "[f(a=1" + "+1" * 40_000 + ")]"),
        ("qwen3_coder", "<function=f>" + "<parameter=s>" * 10_000),
        ("qwen3_coder", "<function=f><parameter=a>" + "[" * 40_000 + "</parameter>"),
    ],
)
def test_hostile_texts_end_soon(name, text):
    content, calls = parse(name, [text])
    assert calls or content == text
    pieces = [text[i : i + 50] for i in range(0, len(text), 50)]
    assert parse(name, pieces) == (content, calls)


@pytest.mark.parametrize(
    "name,text",
    [
        ("hermes", "<" * 20_000),
        ("hermes", " " * 30_000),
        ("hermes", "x\n" + " " * 30_000),
        ("hermes", "<tool_call> " * 2_500),
        ("hermes", "<tool_call>{" * 2_500),
        ("hermes", '<tool_call>{"name": "f", "arguments": {x' + "<" * 30_000),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "' + r"\n\u00e9" * 4_000 + '"}}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"k": [' + '{"a": [1, true]}, ' * 2_000 + "0]}}"),
        ("llama3_json", "{" * 20_000),
        ("llama3_json", "{\n" * 10_000),
        ("mistral", "[" * 20_000),
        ("mistral", "[TOOL_CALLS]" + "a" * 30_000),
        ("pythonic", "[" * 20_000),
        ("pythonic", "[\n" * 10_000),
        ("pythonic", "[f(a='" + "x" * 30_000),
        ("qwen3_coder", "<function=" * 3_000),
        ("qwen3_coder", "<function=f><parameter=s>" + "<" * 30_000),
        ("qwen3_coder", "<function=f><parameter=a>[" + "1," * 15_000 + "1]</parameter>"),
    ],
)
def test_what_means_nothing_is_read_at_once(name, text):
    """Python's work is counted, for which a loaded machine makes no difference: a call in 20 characters at most."""
    num_calls = 0

    def count(frame, event, argument):
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    parser = parser_of(name)
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        parser.feed(text)
        parser.finish()
    finally:
        sys.setprofile(before)
    assert num_calls < len(text) / 20


def test_what_was_marked_can_be_taken_back_over_many_pieces():
    source = Source()
    source.mark()
    for i in range(1_000):
        source.add(f"{i % 10}")
        source.read(1)
    assert source.marked() == "0123456789" * 100 and source.position == 1_000
    source.add("x")
    source.back(995)
    assert (source.position, source.marked()) == (5, "01234")
    source.unmark()
    assert source.take(re.compile(r"\d+"))[0] == "56789" + "0123456789" * 99 and source.position == 1_000


@pytest.mark.parametrize(
    "schema", [{"anyOf": 5}, {"type": 5}, {"type": {"string": 1}}, {"oneOf": {"a": 1}}, {"anyOf": [5, None]}, 5, None]
)
def test_schemas_that_are_none_give_strings(schema):
    tools = [tool("f", {"properties": {"a": schema}})]
    text = "<function=f><parameter=a>5</parameter></function>"
    found = make_parser("qwen3_coder", tools).feed(text)
    assert [delta.arguments for delta in found if isinstance(delta, ToolDelta)] == ['{"a": "5"}']


def test_deeply_nested_alternatives():
    schema: dict = {"type": "integer"}
    for _ in range(5_000):
        schema = {"anyOf": [schema]}
    parser = make_parser("qwen3_coder", [tool("f", {"properties": {"a": schema}})])
    assert parser.feed("<function=f><parameter=a>5</parameter></function>")[0].arguments == '{"a": 5}'


@pytest.mark.parametrize(
    "name,text,is_whole",
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "', False),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}', True),
        ("hermes", '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "f", "arguments": {', False),
        ("hermes", '<tool_call>{"name": "f", "arguments": {x', False),
        ("mistral", "[TOOL_CALLS]f{}", True),
        ("mistral", '[TOOL_CALLS]f{"n', False),
        ("pythonic", "[f(), g(", True),
        ("qwen3_coder", "<function=f><parameter=s>x</parameter>", False),
        ("qwen3_coder", "<function=f></function>", True),
        ("required", '[{"name": "f", "parameters": {"n', False),
    ],
)
def test_whether_the_last_call_is_whole(name, text, is_whole):
    parser = parser_of(name)
    parser.feed(text)
    parser.finish()
    assert parser.num_calls and parser.is_whole is is_whole


GOOD_JSON = [
    '{"a": [1, -0.5e+3, true, null, "x\\u00e9\\n"], "b": {}}', "[]", '[[{}], ""]', ' {"a":\t1}',
    '[[1, 2, [3, {"a": [[]]}]], {"b": {"c": {"d": ["x,]"]}}}]',
]  # fmt: skip
BAD_JSON = [
    "{a: 1}", '{"a" 1}', '{"a": 1,}', "[1,]", "[1 2]", '["\n"]', '["\\x"]', "[01]", "[.5]", "{]", "[nul]", "[NaN]",
    "[1}", "[[1, 2,], 3]", '[{"a": 1, 2}, 3]', "[1, [01], 2]", '{"a": ["\\ud8x0"], "b": 1}', "[1, tru, 2]", "[1,, 2]",
]  # fmt: skip


def test_the_scanner_knows_json():
    for text in GOOD_JSON:
        json.loads(text)
        assert is_json(text), text
        scanner = JsonScanner()
        assert sum(scanner.scan(char) for char in text) == len(text) and scanner.done
    assert is_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) and not is_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    for text in BAD_JSON:
        scanner = JsonScanner()
        scanner.scan(text)
        assert scanner.broken and not is_json(text), text


TREE = {
    "$ref": "#/$defs/Node",
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"n": {"type": "integer"}, "next": {"$ref": "#/$defs/Node"}},
            "required": ["n"],
            "additionalProperties": False,
        }
    },
}
LEAF = {"type": "object", "properties": {"leaf": {"$ref": "#/$defs/Node"}, "again": {"$ref": "#/properties/leaf"}},
        "required": ["leaf"], "$defs": {"Node": {"type": "string", "enum": ["x", "y"]}}}  # fmt: skip


def tool(name, parameters=None):
    return {"type": "function", "function": {"name": name, **({"parameters": parameters} if parameters else {})}}


@pytest.fixture(scope="module")
def matches(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)

    def check(schema, text):
        matcher: LLMatcher = compile_grammar(StructuredOutputs(json=schema), tokenizer)
        tokens = tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return check


def test_required_calls_keep_each_tools_own_definitions(matches):
    schema = required_schema([tool("tree", TREE), tool("leaf", LEAF), tool("bare")], parallel=True)
    good = [
        '[{"name": "tree", "parameters": {"n": 1, "next": {"n": 2}}}]',
        '[{"name": "leaf", "parameters": {"leaf": "x", "again": "y"}}, {"name": "bare", "parameters": {}}]',
    ]
    bad = [
        "[]", '[{"name": "other", "parameters": {}}]', '[{"name": "tree", "parameters": {"leaf": "x"}}]',
        '[{"name": "leaf", "parameters": {"leaf": {"n": 1}}}]', '[{"name": "bare", "parameters": {"n": 1}}]',
        '[{"name": "leaf", "parameters": {"leaf": "x", "other": 1}}]',
    ]  # fmt: skip
    for text in good:
        assert matches(schema, text), text
        assert [call[0] for call in parse("required", [text])[1]] == [call["name"] for call in json.loads(text)]
    for text in bad:
        assert not matches(schema, text), text
    assert not matches(required_schema([tool("bare")], parallel=False), '[{"name":"bare","parameters":{}}, ')


def test_named_calls(matches):
    assert matches(named_schema(tool("tree", TREE)), '{"n": 1, "next": {"n": 2}}')
    assert matches(named_schema(tool("bare")), "{}") and not matches(named_schema(tool("bare")), '{"a": 1}')
    assert matches(named_schema(tool("open", {"additionalProperties": True})), '{"a": 1}')


@pytest.mark.parametrize("name", ["default", "const", "enum", "examples", "$ref", "properties"])
def test_properties_may_be_called_as_keywords(matches, name):
    schema = {
        "type": "object", "properties": {name: {"$ref": "#/$defs/examples"}}, "required": [name],
        "additionalProperties": False, "$defs": {"examples": {"properties": {"enum": {"$ref": "#/$defs/enum"}}},
                                                 "enum": {"type": "integer"}},
    }  # fmt: skip
    required = required_schema([tool("f", schema)], parallel=True)
    for value, good in (({"enum": 1}, True), ({"enum": "x"}, False)):
        assert matches(required, json.dumps([{"name": "f", "parameters": {name: value}}])) is good


def test_too_deep_a_schema_is_refused():
    schema: dict = {}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="nested more than 64"):
        required_schema([tool("f", {"properties": {"a": schema}})], parallel=True)
