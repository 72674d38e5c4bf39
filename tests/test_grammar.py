"""Constrained decoding: every text that a mask lets through is one the grammar means, whatever is drawn."""

import itertools
import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from checkpoints import BOS, EOS, VOCAB_SIZE, write_tokenizer
from tokenizers import Tokenizer

from infer import SamplingParams
from infer.engine.grammar import Grammars
from infer.request import StructuredOutputs
from infer.structured import GrammarChecker, without_unknown_formats

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blå"]}, "maxItems": 2},
        "ok": {"type": "boolean"},
        "near": {"anyOf": [{"type": "null"}, {"type": "number"}]},
    },
    "required": ["name", "age", "tags", "ok", "near"],
    "additionalProperties": False,
}
COMPACT = StructuredOutputs(json=SCHEMA, disable_any_whitespace=True)
REGEXES = [r"[0-9]{4}-[01][0-9]", r"(a|ab|abc)(c|bcd)?d*x", r"[a-zé]{2,5}( [A-Z]+)?", "ja|nein|ja, bitte", ".{3}"]
CHOICES = [
    ["a", "ab", "abc", "b"],
    ["yes", "no", "yes and no"],
    ['say "hi"\n', "\\", "naïve 🙂", "日本"],
    ["x"],
    ["\x00\x7f", "\u2028", "/x/i", "'"],
]
SUM = """
start: sum
sum: product (("+" | "-") product)*
product: atom (("*" | "/") atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(directory):
    made = Grammars(directory, VOCAB_SIZE, num_threads=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def checker(directory):
    made = GrammarChecker(directory)
    yield made
    made.close()


def params_for(structured, **more):
    return SamplingParams(**{"structured_outputs": structured, "max_tokens": None, **more})


def allowed(mask):
    bits = np.unpackbits(mask.words.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def ask(grammars, grammar, tokens):
    (mask,) = grammars.start([(grammar, np.array(tokens, np.int32))]).result()
    return mask


def walk(grammars, params, rng, ends=(EOS,), limit=300):
    """The tokens of a text whose every token is drawn evenly from its mask; an end token ends it where one may come."""
    grammar, tokens = grammars.open(params, ends), []
    while len(tokens) < limit:
        mask = ask(grammars, grammar, tokens)
        assert mask.error is None
        if mask.words is None:
            assert mask.ended
            return tokens
        candidates = allowed(mask)
        assert candidates and max(candidates) < VOCAB_SIZE and BOS not in candidates
        if EOS in candidates and (len(candidates) == 1 or rng.random() < 0.5):
            return tokens
        tokens.append(rng.choice([token for token in candidates if token != EOS]))
    raise AssertionError(f"no end after {limit} tokens")


def is_person(text):
    value = json.loads(text)
    assert set(value) == {"name", "age", "tags", "ok", "near"}
    assert isinstance(value["name"], str) and len(value["name"]) <= 6
    assert type(value["age"]) is int and 0 <= value["age"] <= 130
    assert set(value["tags"]) <= {"red", "green", "blå"} and len(value["tags"]) <= 2
    assert type(value["ok"]) is bool
    assert value["near"] is None or type(value["near"]) in (int, float)
    return True


# ------------------------------------------------------------------------------------------ every text fits


@pytest.mark.parametrize("regex", REGEXES)
def test_every_text_matches_its_regex(regex, grammars, tokenizer):
    rng, texts = random.Random(regex), set()
    for _ in range(60):
        text = tokenizer.decode(walk(grammars, params_for(StructuredOutputs(regex=regex)), rng))
        assert re.fullmatch(regex, text), text
        texts.add(text)
    assert len(texts) > 2


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_text_is_one_of_the_choices_and_every_choice_can_come(choice, grammars, tokenizer):
    rng = random.Random(str(choice))
    params = params_for(StructuredOutputs(choice=choice))
    assert {tokenizer.decode(walk(grammars, params, rng)) for _ in range(60 * len(choice))} == set(choice)


def test_every_text_fits_its_schema(grammars, tokenizer):
    rng = random.Random(3)
    for structured in (COMPACT, StructuredOutputs(json=json.dumps(SCHEMA), whitespace_pattern=" ?")):
        texts = {tokenizer.decode(walk(grammars, params_for(structured), rng)) for _ in range(25)}
        assert all(map(is_person, texts)) and len(texts) > 20


def test_any_object_and_a_grammar(grammars, tokenizer):
    rng = random.Random(4)
    for _ in range(20):
        text = tokenizer.decode(walk(grammars, params_for(StructuredOutputs(grammar=SUM)), rng))
        eval(re.sub(r"\b0+(?=\d)", "", text).replace("/", "+"))  # its syntax is Python's, but for leading zeros
    params = params_for(StructuredOutputs(json_object=True, disable_any_whitespace=True))
    objects = 0
    for _ in range(30):
        try:
            text = tokenizer.decode(walk(grammars, params, rng))
        except AssertionError:  # strings have no largest length: some texts never come to an end
            continue
        assert isinstance(json.loads(text), dict)
        objects += 1
    assert objects > 10


# ------------------------------------------------------------------------------------------ a function of the tokens


@pytest.mark.parametrize(
    "structured",
    [
        COMPACT,
        StructuredOutputs(regex=REGEXES[2]),
        StructuredOutputs(choice=CHOICES[2]),
        StructuredOutputs(grammar=SUM),
    ],
    ids=lambda structured: structured.kind,
)
def test_a_mask_is_a_function_of_the_tokens(structured, grammars):
    """After a restart, or where several tokens come at once, the mask is that of the grammar that saw each come."""
    params, rng = params_for(structured), random.Random(5)
    tokens = walk(grammars, params, rng)
    followed = grammars.open(params, [EOS])
    for length in range(len(tokens) + 1):
        known = tokens[:length]
        mask, again = ask(grammars, followed, known), ask(grammars, grammars.open(params, [EOS]), known)
        assert mask.ended == again.ended and mask.words.tolist() == again.words.tolist(), known
        asked_twice = ask(grammars, followed, known)
        assert asked_twice.words.tolist() == mask.words.tolist()


def test_masks_of_a_batch_are_those_of_each_alone(grammars):
    many = [params_for(s) for s in (COMPACT, StructuredOutputs(regex="[0-9]+"), StructuredOutputs(choice=["a", "b"]))]
    outputs = [[], [23], []]
    outputs = [np.array(tokens, np.int32) for tokens in outputs]
    alone = [ask(grammars, grammars.open(p, [EOS]), o) for p, o in zip(many, outputs, strict=True)]
    batch = grammars.start([(grammars.open(p, [EOS]), o) for p, o in zip(many, outputs, strict=True)]).result()
    assert batch[1].error is not None or batch[1].words.tolist() == alone[1].words.tolist()
    for i in (0, 2):
        assert batch[i].words.tolist() == alone[i].words.tolist()


# ------------------------------------------------------------------------------------------ ends


def token_of(tokenizer, text):
    (token,) = tokenizer.encode(text).ids
    return token


def test_an_end_token_may_come_where_the_text_is_complete(grammars, tokenizer):
    digits, one = params_for(StructuredOutputs(regex="[0-9]{1,3}")), token_of(tokenizer, "1")
    grammar = grammars.open(digits, [EOS])
    assert EOS not in allowed(ask(grammars, grammar, []))
    inside = ask(grammars, grammar, [one])
    assert EOS in allowed(inside) and one in allowed(inside) and not inside.ended
    ended = ask(grammars, grammar, [one] * 3)
    assert allowed(ended) == [EOS] and ended.ended


def test_ignore_eos_holds_until_nothing_else_can_come(grammars, tokenizer):
    one = token_of(tokenizer, "1")
    grammar = grammars.open(params_for(StructuredOutputs(regex="[0-9]{1,3}"), ignore_eos=True), [EOS])
    assert EOS not in allowed(ask(grammars, grammar, [one]))
    assert allowed(ask(grammars, grammar, [one] * 3)) == [EOS]


@pytest.mark.parametrize(("ends", "more"), [([], {}), ([EOS], {"allowed_token_ids": [22, 23, 24]})])
def test_without_an_end_token_to_draw_the_text_just_ends(ends, more, grammars, tokenizer):
    one = token_of(tokenizer, "1")
    grammar = grammars.open(params_for(StructuredOutputs(regex="[0-9]{1,3}"), **more), ends)
    assert EOS not in allowed(ask(grammars, grammar, [one]))
    mask = ask(grammars, grammar, [one] * 3)
    assert (mask.words, mask.ended, mask.error) == (None, True, None)


def test_every_end_token_of_the_model_counts(grammars, tokenizer):
    grammar = grammars.open(params_for(StructuredOutputs(choice=["1"])), [EOS, 2])
    assert allowed(ask(grammars, grammar, [token_of(tokenizer, "1")])) == [EOS, 2]


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("structured", "words"),
    [
        (StructuredOutputs(json='{"type": "strin"}'), "structured_outputs.json: .*strin"),
        (StructuredOutputs(json='{"type": '), "structured_outputs.json: .*"),
        (StructuredOutputs(json={"type": "array", "uniqueItems": True}), "structured_outputs.json: .*uniqueItems"),
        (StructuredOutputs(json={"$ref": "http://127.0.0.1:9/schema"}), "structured_outputs.json: "),
        (StructuredOutputs(json={"$ref": "file:///etc/passwd"}), "structured_outputs.json: "),
        (StructuredOutputs(json={"type": "string", "pattern": "(a"}), "structured_outputs.json: "),
        (StructuredOutputs(regex="(a"), "structured_outputs.regex: "),
        (StructuredOutputs(regex="a(?=b)c"), "structured_outputs.regex: "),
        (StructuredOutputs(grammar="start: A B"), "structured_outputs.grammar: "),
        (StructuredOutputs(grammar="begin: /a/"), "structured_outputs.grammar: "),
        (StructuredOutputs(json={"not": {}}), "structured_outputs.json: "),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_what_cannot_be_compiled_is_said(structured, words, checker, grammars):
    with pytest.raises(ValueError, match=words) as caught:
        checker.check(structured)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    mask = ask(grammars, grammars.open(params_for(structured), [EOS]), [])
    assert mask.words is None and mask.error is not None and not mask.ended


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "password"},
        {"format": "int64", "type": ["integer", "null"]},
        {"properties": {"const": {"anyOf": [{"type": "string", "format": "file-path"}]}, "format": {"format": "byte"}}},
        {"$defs": {"x": {"type": "array", "items": {"format": "uri-reference"}}}, "$ref": "#/$defs/x"},
    ],
)
def test_formats_that_are_not_known_only_describe(schema, checker):
    checker.check(StructuredOutputs(json=schema))


def test_formats_that_are_known_hold(grammars, tokenizer):
    rng, known = random.Random(7), {"type": "object", "properties": {"day": {"type": "string", "format": "date"}},
                                    "required": ["day"], "additionalProperties": False}  # fmt: skip
    known["properties"]["mode"] = {"const": {"format": "password"}}
    structured = StructuredOutputs(json=known, disable_any_whitespace=True)
    text = tokenizer.decode(walk(grammars, params_for(structured), rng))
    assert re.fullmatch(r'\{"day":"\d{4}-\d{2}-\d{2}"(,"mode":\{"format":"password"\})?\}', text), text
    assert without_unknown_formats({**known, "format": "binary", "enum": [{"format": "x"}]}) == {
        **known, "enum": [{"format": "x"}],
    }  # fmt: skip


def test_one_that_fails_leaves_the_others_alone(grammars):
    bad = grammars.open(params_for(StructuredOutputs(regex="(a")), [EOS])
    good = grammars.open(params_for(StructuredOutputs(regex="a")), [EOS])
    nothing = np.empty(0, np.int32)
    for _ in range(2):
        first, second = grammars.start([(bad, nothing), (good, nothing)]).result()
        assert first.words is None and "structured_outputs.regex" in first.error
        assert second.error is None and allowed(second)


def test_tokens_that_do_not_fit_are_an_error(grammars, tokenizer):
    grammar = grammars.open(params_for(StructuredOutputs(regex="[0-9]")), [EOS])
    assert "structured_outputs" in ask(grammars, grammar, [token_of(tokenizer, "x")]).error


def test_a_directory_without_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(ValueError, match=r"structured_outputs needs .*tokenizer\.json"):
        GrammarChecker(tmp_path).check(StructuredOutputs(regex="a"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"structured_outputs cannot use .*tokenizer\.json"):
        GrammarChecker(tmp_path).check(StructuredOutputs(regex="a"))
    without = Grammars(None, VOCAB_SIZE, 1)
    mask = ask(without, without.open(params_for(StructuredOutputs(regex="a")), [EOS]), [])
    assert "needs tokenizer.json" in mask.error
    without.close()


# ------------------------------------------------------------------------------------------ hostile


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE = {
    "deep schema": lambda: StructuredOutputs(json=nested(100)),
    "deeper text": lambda: StructuredOutputs(json="[" * 200_000),
    "deep text of objects": lambda: StructuredOutputs(json='{"properties":{"a":' * 5000),
    "many properties": lambda: StructuredOutputs(
        json={"type": "object", "properties": {f"p{i}": {} for i in range(9000)}}
    ),
    "huge counts": lambda: StructuredOutputs(regex="(a{1,1000}){1,1000}"),
    "counts of counts": lambda: StructuredOutputs(regex="((((a{1,99}){1,99}){1,99}){1,99}){1,99}"),
    "exponential determinization": lambda: StructuredOutputs(regex="(a|b)*a(a|b){300}"),
    "unicode classes": lambda: StructuredOutputs(regex=r"(\w\W\d\s\p{L}){500}"),
    "long alternation": lambda: StructuredOutputs(
        regex="|".join("".join(word) for word in itertools.product("abcdef", repeat=5))
    ),
    "left recursion": lambda: StructuredOutputs(grammar='start: start start | "a"'),
    "ambiguity": lambda: StructuredOutputs(grammar='start: x\nx: x x x | x x | "a" | ""'),
    "empty recursion": lambda: StructuredOutputs(grammar="start: start"),
    "big repetition": lambda: StructuredOutputs(grammar='start: ("a" | "b"){1,1000000}'),
    "nested repetition": lambda: StructuredOutputs(grammar='start: (((("a"){1,99}){1,99}){1,99}){1,99}'),
    "recursive reference": lambda: StructuredOutputs(json={"$ref": "#"}),
    "mutual references": lambda: StructuredOutputs(
        json={"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "exponential allOf": lambda: StructuredOutputs(
        json={
            "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)} | {"d30": {}},
            "$ref": "#/$defs/d0",
        }
    ),
    "exponential anyOf": lambda: StructuredOutputs(
        json={"allOf": [{"anyOf": [{"minimum": i}, {"maximum": -i}]} for i in range(25)]}
    ),
    "huge items": lambda: StructuredOutputs(json={"type": "array", "minItems": 10**9, "items": {"type": "null"}}),
    "huge string": lambda: StructuredOutputs(json={"type": "string", "minLength": 10**9}),
    "huge numbers": lambda: StructuredOutputs(json='{"type": "integer", "minimum": -1e308, "multipleOf": 3e-300}'),
    "many optional counts": lambda: StructuredOutputs(regex="a?" * 30_000),
    "many counts": lambda: StructuredOutputs(regex="a{1000}" * 8000),
    "many counts in a pattern": lambda: StructuredOutputs(json={"type": "string", "pattern": "a{9,1000}" * 8000}),
    "chain of rules": lambda: StructuredOutputs(
        grammar="start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(3800)) + '\na3800: "x"'
    ),
    "chain of references": lambda: StructuredOutputs(
        json={"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}, "$ref": "#/$defs/d0"}
    ),
    "multiples": lambda: StructuredOutputs(json={"type": "integer", "multipleOf": 1234567}),
    "JSON in a grammar": lambda: StructuredOutputs(
        grammar='start: %json {"properties": {' + ",".join(f'"{i}":{{}}' for i in range(5000)) + "}}"
    ),
    "many choices": lambda: StructuredOutputs(choice=[f"{i:0250d}" for i in range(1000)]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_take_bounded_time(name, checker, grammars):
    structured = HOSTILE[name]()
    try:
        checker.check(structured)
    except ValueError as error:
        assert len(str(error)) < 600 and str(error).startswith(f"structured_outputs.{structured.kind}: ")
        return
    started = time.process_time()  # in this process, as on a rank
    grammar, tokens, rng = grammars.open(params_for(structured), [EOS]), [], random.Random(6)
    for _ in range(20):
        mask = ask(grammars, grammar, tokens)
        candidates = [] if mask.words is None else [token for token in allowed(mask) if token != EOS]
        if not candidates:
            break
        tokens.append(rng.choice(candidates))
    assert time.process_time() - started < 1.0


def test_what_kills_the_compiler_is_refused_and_the_next_is_checked(checker):
    for name in ("chain of rules", "multiples", "many optional counts"):
        with pytest.raises(ValueError, match=r"it is too complex: compiling it took over 0\.5 s, 3 GiB or the stack"):
            checker.check(HOSTILE[name]())
    with pytest.raises(ValueError, match="counts of repetition add up to 8000000; at most 20000 may"):
        checker.check(HOSTILE["many counts"]())
    checker.check(StructuredOutputs(regex="[a-z]{1,20}"))


def test_a_worker_that_was_killed_is_replaced(directory):
    checker = GrammarChecker(directory)
    checker.warm()
    checker._worker.kill()
    checker.check(StructuredOutputs(regex="a"))
    with pytest.raises(ValueError, match=r"structured_outputs\.regex"):
        checker.check(StructuredOutputs(regex="(a"))
    worker = checker._worker
    checker.close()
    assert worker.poll() is not None


def test_many_threads_may_check_at_once(checker):
    """What was good lately does not wait for a worker that is busy with something else."""
    known = StructuredOutputs(regex="known")
    checker.check(known)
    with checker._working:
        checker.check(known)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(checker.check, [StructuredOutputs(regex=f"a{i}") for i in range(8)]))
    assert results == [None] * 8
