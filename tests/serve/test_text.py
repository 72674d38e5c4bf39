"""Detokenization and stop strings, against decoding the whole at once."""

import json
import random

import pytest
from fake_engine import write_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from infer.request import SamplingParams
from infer.serve.text import TextStream, Tokenizer

CORPUS = [
    "👩‍👩‍👧‍👦👍🏽 🇫🇷🇩🇪 1️⃣",
    "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "你好，世界。日本語テキスト 한국어", "e\u0301 a\u0308\u0323 \u0915\u094d\u0937\u093f", "مرحبا بالعالم، كيف الحال؟",
    "def f(x: int) -> None:\n\treturn {'a': [x, 1.5e-3]}  # café\n", "  leading and  double  spaces \n\n",
    "\x00\u200b\ufeff\ufffd", "ﷺ ① ｆｕｌｌ ﬁ", "a<tool call>b <|im_end|> c",
]  # fmt: skip
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
    assert tokenizer.vocabulary.is_joined
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
    assert fallback.vocabulary.is_joined and fallback.vocabulary.drops_first_space
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choice(["hello ", "世", "😀", "é", "a", "b ", "你"]) for _ in range(20))
        pieces = [fallback.encode(char, add_special_tokens=False) for char in text.replace(" ", "▁")]
        ids = [token for piece in pieces for token in piece]
        stream, chunks = stream_text(fallback, ids, rng.randint(1, 4))
        assert stream.text == fallback.decode(ids) == text
        assert "\ufffd" not in "".join(chunks)


def test_first_word_keeps_its_space_after_a_prompt(fallback):
    ids = [fallback.vocabulary.token_id("▁world"), fallback.vocabulary.token_id("▁the")]
    prompt = [1, fallback.vocabulary.token_id("▁hello")]
    assert stream_text(fallback, ids, prompt=prompt)[0].text == " world the"
    assert stream_text(fallback, ids)[0].text == "world the"
    assert fallback.token(ids[0]) == " world" and fallback.token_bytes(3 + 0xE4) == b"\xe4"
    assert [*map(fallback.vocabulary.piece, (ids[0], 3 + 0xE4, 1, 999))] == ["▁world", "<0xE4>", "<s>", ""]


def test_garbage_bytes_do_not_pile_up(fallback, windowed):
    for tokenizer, garbage in ((fallback, 3 + 0x80), (windowed["metaspace"], 3 + 0x80)):
        stream = TextStream(tokenizer, SamplingParams())
        shown = [stream.append([garbage]) for _ in range(200)]
        assert sum(map(len, shown)) > 150


def test_joined_tokens_are_the_librarys_text(tokenizer, fallback):
    """Where the bytes are characters; else ours shows them as it does in streams."""
    rng, same = random.Random(5), 0
    for ours in (tokenizer, fallback):
        library = ours.vocabulary._tokenizer
        runs = [ours.encode(text) for text in CORPUS]
        runs += [[rng.randrange(ours.vocab_size) for _ in range(rng.randrange(8))] for _ in range(500)]
        for ids in runs:
            for skip in (True, False):
                wanted = library.decode(ids, skip_special_tokens=skip)
                if "\ufffd" not in wanted or ours is tokenizer:
                    assert ours.decode(ids, skip_special_tokens=skip) == wanted
                    same += 1
        assert ours.decode([]) == ""
    assert same > 1200


def save(path, backend, **config):
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """Tokenizers whose tokens' text depends on their neighbours."""
    base = tmp_path_factory.mktemp("windowed")
    texts = ["hello world this is a small test", "unaffable words, 你好 café"] * 20
    special = ["[UNK]", "[CLS]", "[SEP]"]
    pieces = Backend(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=False)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    pieces.train_from_iterator(texts, trainer)
    pieces.add_tokens([AddedToken("<tool>", special=False)])
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocab += [(piece, -float(i)) for i, piece in enumerate(["▁", "▁hello", "▁world", "l", "o", "h", "e", "▁a", "你"])]
    unigram = Backend(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    unigram.add_special_tokens(["<unk>", "<s>", "</s>"])
    suffixes = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    suffixes.pre_tokenizer = pre_tokenizers.Whitespace()
    suffixes.decoder = decoders.BPEDecoder(suffix="</w>")
    suffixes.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False),
    )
    backends = {"wordpiece": pieces, "metaspace": unigram, "suffixes": suffixes}
    return {name: save(base / name, backend) for name, backend in backends.items()}


@pytest.mark.parametrize("name", ["wordpiece", "metaspace", "suffixes"])
def test_streams_where_neighbours_decide(windowed, name):
    tokenizer, rng = windowed[name], random.Random(4)
    assert not tokenizer.vocabulary.is_joined
    words = ["hello", "world", "a", "你好", "unaffable", ","]
    texts = CORPUS + [" ".join(rng.choice(words) for _ in range(12)) for _ in range(60)]
    for text in texts:
        ids = tokenizer.encode(text)
        for skip in (True, False):
            stream, _ = stream_text(tokenizer, ids, rng.randint(1, 3), skip_special_tokens=skip)
            assert stream.text.strip() == tokenizer.decode(ids, skip_special_tokens=skip).strip()
            assert stream.num_tokens == len(ids)


def test_spaces_between_special_tokens(windowed, tokenizer):
    """Only decoders that put spaces between tokens have any to leave out, and only where special tokens show."""
    words = windowed["wordpiece"]
    ids = [1, 2, *words.encode("hello"), words.encode("<tool>")[0], 2, 2, *words.encode("world")]
    for skip, spaces, wanted in [
        (False, True, "[CLS] [SEP] hello <tool> [SEP] [SEP] world"),
        (False, False, "[CLS][SEP] hello <tool>[SEP][SEP] world"),
        (True, False, "hello <tool> world"),
    ]:
        params = {"skip_special_tokens": skip, "spaces_between_special_tokens": spaces}
        assert stream_text(words, ids, **params)[0].text == wanted
    for spaces in (True, False):
        params = {"skip_special_tokens": False, "spaces_between_special_tokens": spaces}
        assert stream_text(tokenizer, [1, 2, 2], **params)[0].text == "<|im_start|><|im_end|><|im_end|>"


@pytest.mark.parametrize("text", CORPUS)
def test_corpus_comes_in_whole_characters(tokenizer, text):
    ids = [token for char in text for token in tokenizer.encode(char)]
    for step in (1, 3):
        stream, chunks = stream_text(tokenizer, ids, step, skip_special_tokens=False)
        assert stream.text == tokenizer.decode(ids, skip_special_tokens=False) == text
        assert "".join(chunks).count("\ufffd") == text.count("\ufffd")


def test_bad_words(tokenizer, fallback):
    words = ["the", " world", "x"]
    wanted = []
    for word in words:
        bare, spaced = tokenizer.encode(word.strip()), tokenizer.encode(" " + word.strip())
        wanted += [bare, spaced] if len(bare) == len(spaced) and bare[0] != spaced[0] else [bare]
    assert tokenizer.bad_words_token_ids(words) == wanted and len(wanted) > len(words)
    assert tokenizer.bad_words_token_ids([]) == []
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="bad_words must hold words"):
            tokenizer.bad_words_token_ids(["hello", empty])


def test_long_texts_get_the_same_ids(tokenizer):
    text = " ".join(CORPUS * 200)
    assert len(text) > 20_000
    assert tokenizer.encode(text) == tokenizer.vocabulary._tokenizer.encode(text).ids
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode(text + "\ud800")


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
    hello, world = (fallback.vocabulary.token_id(word) for word in ("▁hello", "▁world"))
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
        ("tokenizer.json", None, "does not exist, nor tokenizer.model"),
        ("tokenizer.json", "{", "is not a tokenizer"),
        ("tokenizer_config.json", None, "does not exist"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "not valid Jinja"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x", "template": ""}]}', "no template named"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    path = write_tokenizer(tmp_path)
    (path / name).unlink() if content is None else (path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert name in str(caught.value)


def test_vocabularies_that_do_not_divide_text(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vocab.json does not say how text is divided. Write one with transformers"):
        Tokenizer.load(tmp_path)


def test_half_a_surrogate_pair(tokenizer):
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_transformers_agrees(tokenizer_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_path)
    for text in ("hello world", EMOJI, " <|im_end|> x <tool call>", ""):
        assert tokenizer.encode(text) == theirs.encode(text)
    ids = [*range(tokenizer.vocab_size)]
    assert [*map(tokenizer.vocabulary.piece, ids)] == theirs.convert_ids_to_tokens(ids)
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yes"}]
    for kwargs in ({"add_generation_prompt": True}, {"add_generation_prompt": False, "continue_final_message": True}):
        ours = tokenizer.apply_chat_template(messages, **kwargs)
        assert ours == theirs.apply_chat_template(messages, tokenize=False, **kwargs)
