"""Detokenization and stop strings, against decoding the whole at once."""

import json
import random

import pytest
from fake_engine import write_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, processors

from infer.request import SamplingParams
from infer.serve.text import TextStream, Tokenizer

EMOJI = "Hi 👩‍👩‍👧‍👦 naïve 你好 😀🇫🇷 e\u0301 — ok"


def stream_text(tokenizer, ids, step=1, stopped=False, prompt=(), **params):
    stream = TextStream(tokenizer, SamplingParams(**params), prompt)
    chunks = [stream.append(ids[i : i + step], stopped and i + step >= len(ids)) for i in range(0, len(ids), step)]
    chunks.append(stream.finish())
    assert stream.text == "".join(chunks)
    return stream, chunks


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    """A tokenizer of the SentencePiece kind: word-begin marks, unknown characters as byte tokens."""
    words = ["▁", "▁hello", "▁world", "▁the", "a", "b", "c", "▁a", "lo", "你"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {word: len(vocab) + i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path = tmp_path_factory.mktemp("fallback")
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    return Tokenizer.load(path)


def test_random_tokens_equal_the_full_decode(tokenizer):
    assert tokenizer.is_byte_level
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(60))]
        for skip in (True, False):
            stream, _ = stream_text(tokenizer, ids, rng.randint(1, 5), skip_special_tokens=skip)
            assert stream.text == tokenizer.decode(ids, skip_special_tokens=skip)
            assert stream.num_tokens == len(ids)


def test_every_token_by_itself(tokenizer):
    for token_id in range(tokenizer.vocab_size):
        assert tokenizer.token(token_id) == tokenizer.decode([token_id], skip_special_tokens=False)
    assert tokenizer.token(tokenizer.vocab_size + 5) == ""


def test_characters_come_whole(tokenizer):
    ids = [tokenizer.encode(char, add_special_tokens=False) for char in EMOJI]
    ids = [token for piece in ids for token in piece]
    stream, chunks = stream_text(tokenizer, ids)
    assert stream.text == EMOJI and "\ufffd" not in "".join(chunks)
    assert len([chunk for chunk in chunks if chunk]) > 10


def test_unfinished_character_is_shown_at_the_end(tokenizer):
    ids = tokenizer.encode("ok😀")[:-1]
    stream, chunks = stream_text(tokenizer, ids)
    assert "\ufffd" not in "".join(chunks[:-1]) and stream.text == tokenizer.decode(ids) == "ok\ufffd"


def test_byte_fallback(fallback):
    assert not fallback.is_byte_level
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choice(["hello ", "世", "😀", "é", "a", "b ", "你"]) for _ in range(20))
        pieces = [fallback.encode(char, add_special_tokens=False) for char in text.replace(" ", "▁")]
        ids = [token for piece in pieces for token in piece]
        stream, chunks = stream_text(fallback, ids, rng.randint(1, 4))
        assert stream.text == fallback.decode(ids) == text
        assert "\ufffd" not in "".join(chunks)


def test_first_word_keeps_its_space_after_a_prompt(fallback):
    ids = [fallback._backend.token_to_id("▁world"), fallback._backend.token_to_id("▁the")]
    prompt = [1, fallback._backend.token_to_id("▁hello")]
    assert stream_text(fallback, ids, prompt=prompt)[0].text == " world the"
    assert stream_text(fallback, ids)[0].text == "world the"
    assert fallback.token(ids[0]) == " world" and fallback.token_bytes(3 + 0xE4) == b"\xe4"


def test_garbage_bytes_do_not_pile_up(fallback):
    stream = TextStream(fallback, SamplingParams())
    shown = [stream.append([3 + 0x80]) for _ in range(200)]
    assert sum(map(len, shown)) > 150


BOS = processors.TemplateProcessing(single="<|im_start|> $A", pair=None, special_tokens=[("<|im_start|>", 1)])


@pytest.mark.parametrize("processor", [None, BOS, processors.ByteLevel(trim_offsets=False)], ids=["", "bos", "bytes"])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_bos_and_eos_are_added_as_by_transformers(tmp_path, processor, tokenizer_class):
    transformers = pytest.importorskip("transformers")
    settings = [{f"add_{kind}_token": value} for kind in ("bos", "eos") for value in (True, False, None)]
    for config in [{}, *settings, {"add_bos_token": True, "add_eos_token": True}]:
        path = write_tokenizer(tmp_path, tokenizer_class=tokenizer_class, **config)
        if processor is not None:
            backend = Backend.from_file(str(path / "tokenizer.json"))
            backend.post_processor = processor
            backend.save(str(path / "tokenizer.json"))
        ours = Tokenizer.load(path)
        assert ours.encode("hello") == transformers.AutoTokenizer.from_pretrained(path)("hello").input_ids, config
        assert (ours.encode("hello")[0] == 1) == (processor is BOS)
        assert 1 not in ours.encode("hello", add_special_tokens=False)


def test_generated_text_after_a_prompt_that_ends_inside_a_character(fallback):
    """As decoding it alone gives it, but for the first word's space: the prompt's bytes neither join nor eat any."""
    half, rest = [3 + byte for byte in "你".encode()[:2]], [3 + byte for byte in "你".encode()[2:]]
    emoji = [3 + byte for byte in "😀😀".encode()]
    hello, world = (fallback._backend.token_to_id(word) for word in ("▁hello", "▁world"))
    for prompt in ([1, hello, *half], [1, hello, *emoji, *half], [1, hello, *emoji]):
        assert stream_text(fallback, [*rest, hello, world], prompt=prompt)[0].text == "\ufffd hello world"
        assert stream_text(fallback, [hello, world], prompt=prompt)[0].text == " hello world"
        assert stream_text(fallback, [*half, *rest, world], prompt=prompt)[0].text == "你 world"


TRIMMING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("template", [TRIMMING, TRIMMING.replace(" | trim", ""), TRIMMING.replace("</s>", "\n </s>")])
@pytest.mark.parametrize("content", ["The answer is ", "The answer is", " \n The answer:\n\n", "x"])
def test_continue_final_message_is_as_in_transformers(tmp_path, template, content):
    transformers = pytest.importorskip("transformers")
    path = write_tokenizer(tmp_path, chat_template=template)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    wanted = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    ours = Tokenizer.load(path)
    assert ours.apply_chat_template(messages, False, continue_final_message=True) == wanted


def test_continue_final_message_that_the_template_shortens(tmp_path):
    path = write_tokenizer(tmp_path, chat_template="{% for m in messages %}{{ m.content[3:] }}{% endfor %}")
    with pytest.raises(ValueError, match="leaves out text of the last message"):
        Tokenizer.load(path).apply_chat_template([{"content": "abcdef"}], False, continue_final_message=True)


def reference_stop(text, stops, include):
    """Cuts at the stop string that is complete first, the longer one of two."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_against_a_plain_search(tokenizer, include):
    rng = random.Random(2)
    found = 0
    for _ in range(500):
        text = "".join(rng.choice("ab😀") for _ in range(25))
        stops = ["".join(rng.choice("ab😀") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
        ids = [token for char in text for token in tokenizer.encode(char)]
        wanted, stop = reference_stop(text, stops, include)
        results = set()
        for step in (1, 2, 7):
            stream, _ = stream_text(tokenizer, ids, step, stop=stops, include_stop_str_in_output=include)
            results.add((stream.text, stream.stop_reason, stream.num_tokens))
        assert len(results) == 1 and results.pop()[:2] == (wanted, stop)
        found += stop is not None
    assert 100 < found < 500


def test_only_a_possible_stop_string_is_held_back(tokenizer):
    stream = TextStream(tokenizer, SamplingParams(stop=["END"]))
    shown = [stream.append(tokenizer.encode(char)) for char in "aENxEND!"]
    assert shown == ["a", "", "", "ENx", "", "", "", ""]
    assert (stream.text, stream.stop_reason, stream.num_tokens, stream.finish()) == ("aENx", "END", 7, "")


def test_no_stop_string_within_min_tokens(tokenizer):
    ids = [token for char in "xx.yy.zz" for token in tokenizer.encode(char)]
    assert len(ids) == 8
    assert stream_text(tokenizer, ids, stop=".", min_tokens=2)[0].text == "xx"
    assert stream_text(tokenizer, ids, stop=".", min_tokens=3)[0].text == "xx.yy"
    assert stream_text(tokenizer, ids, 8, stop=".", min_tokens=6)[0].text == "xx.yy.zz"


def test_stop_token_is_not_text(tokenizer):
    ids = tokenizer.encode("hello") + tokenizer.encode("x")
    stream, _ = stream_text(tokenizer, ids, stopped=True)
    assert (stream.text, stream.num_tokens) == ("hello", len(ids))
    assert stream_text(tokenizer, ids, stopped=True, include_stop_str_in_output=True)[0].text == "hellox"


def test_no_text_without_detokenize(tokenizer):
    stream, _ = stream_text(tokenizer, tokenizer.encode("hello"), detokenize=False)
    assert stream.text == "" and stream.num_tokens == len(tokenizer.encode("hello"))


def test_chat_template_choices(tmp_path, tokenizer):
    user = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(user).endswith("assistant\n")
    named = write_tokenizer(tmp_path / "named", chat_template=[{"name": "default", "template": "D{{ eos_token }}"}])
    assert Tokenizer.load(named).apply_chat_template(user) == "D<|im_end|>"
    (named / "chat_template.jinja").write_text("J{{ messages | tojson }}")
    assert Tokenizer.load(named).apply_chat_template([{"content": "<é>"}]) == 'J[{"content": "<é>"}]'
    none = Tokenizer.load(write_tokenizer(tmp_path / "none", chat_template=None))
    with pytest.raises(ValueError, match="no chat template"):
        none.apply_chat_template(user)
    with pytest.raises(ValueError, match="no tools"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}])
    with pytest.raises(ValueError, match="must not set bos_token"):
        tokenizer.apply_chat_template(user, bos_token="x")


@pytest.mark.parametrize("attack", ["''.__class__.__mro__", "messages.append(1)", "cycler.__init__.__globals__"])
def test_templates_are_sandboxed(tmp_path, attack):
    unsafe = Tokenizer.load(write_tokenizer(tmp_path, chat_template="{{ " + attack + " }}"))
    with pytest.raises(ValueError, match="refuses"):
        unsafe.apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "does not exist"),
        ("tokenizer.json", "{", "is not a tokenizer"),
        ("tokenizer_config.json", None, "does not exist"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "not valid Jinja"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x", "template": ""}]}', "without a template named"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    path = write_tokenizer(tmp_path)
    (path / name).unlink() if content is None else (path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert name in str(caught.value)


def test_half_a_surrogate_pair(tokenizer):
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_transformers_agrees(tokenizer_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_path)
    for text in ("hello world", EMOJI, " <|im_end|> x <tool call>", ""):
        assert tokenizer.encode(text) == theirs.encode(text)
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yes"}]
    for kwargs in ({"add_generation_prompt": True}, {"add_generation_prompt": False, "continue_final_message": True}):
        ours = tokenizer.apply_chat_template(messages, **kwargs)
        assert ours == theirs.apply_chat_template(messages, tokenize=False, **kwargs)
