"""tokenizer.model without tokenizer.json: ids and text are SentencePiece's own."""

import io
import json
import random
import re

import pytest

from infer.request import SamplingParams
from infer.serve.sentencepiece import splitter
from infer.serve.text import TextStream, Tokenizer
from infer.serve.tokenizer_config import AddedToken

sentencepiece = pytest.importorskip("sentencepiece")

TEXT = """the quick brown fox jumps over the lazy dog; hello world, this is a small test of pieces
naïve café 你好 world   with   spaces, def main(argument): return [argument, 12345]
haha hahaha aaaa aaaaaaa ==== -------- https://example.org/a?b=c&d=e"""
CORPUS = [
    "", " ", "  two  spaces  ", "hello world", "Hello\tworld\n\n  indented\n", "aaaaaaaaaaaaaaaaaaaaaaa", "ababababab",
    "👩‍👩‍👧‍👦 🇫🇷🇩🇪 😀", "e\u0301 \u0915\u094d\u0937 ﷺ", "مرحبا بالعالم", "你好，世界", "ﬁ ① Ⅷ ｆｕｌｌ", "a▁b ▁ ▁▁",
    "x<sep>y <sep> z", "\x00\x01\u200b\ufeff", "def f(x):\n    return x[0] == '\\n'\n",
]  # fmt: skip


def train(path, config=None, **options):
    """A directory with tokenizer.model and its configuration; returns it with SentencePiece's own processor."""
    model = io.BytesIO()
    settings = {
        "vocab_size": 420, "model_type": "bpe", "byte_fallback": True, "character_coverage": 0.99, "minloglevel": 2,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "user_defined_symbols": ["<sep>"],
        **options,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 30), model_writer=model, **settings
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(model.getvalue())
    (path / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return path, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The kind that Llama 2 has."""
    return train(tmp_path_factory.mktemp("llama"))


KINDS = {
    "llama": {},
    "unigram": {"model_type": "unigram", "vocab_size": 330},
    "nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no prefix": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False, "vocab_size": 160},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_ids_and_text_are_sentencepieces_own(tmp_path, options):
    path, own = train(tmp_path, **options)
    tokenizer = Tokenizer.load(path)
    assert tokenizer.vocab_size == own.get_piece_size()
    rng = random.Random(0)
    texts = CORPUS + ["".join(rng.choice(" ahe▁=你😀\n.") for _ in range(30)) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids[0] == own.bos_id() and ids[1:] == own.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text)
        if own.unk_id() not in ids:
            assert tokenizer.decode(ids) == own.decode(ids)
    assert tokenizer.decode([0, own.piece_to_id("h")], skip_special_tokens=False) == "<unk>h"


def test_added_tokens(tmp_path):
    config = {
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            "420": {"content": "<|tool|>", "special": False, "rstrip": True, "lstrip": True},
            "421": {"content": "<|tool|>x", "special": True},
            "422": {"content": "word", "special": False, "single_word": True},
        },
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "add_eos_token": True,
    }
    path, own = train(tmp_path, config)
    tokenizer = Tokenizer.load(path)
    hello, world = own.encode("hello"), own.encode(" world")
    assert tokenizer.encode("hello") == [1, *hello, 2]
    assert tokenizer.encode("hello<|tool|> world", False) == [*hello, 420, *own.encode("world")]
    assert tokenizer.encode("hello \n <|tool|>", False) == [*hello, 420]
    assert tokenizer.encode("<|tool|>x world</s>", False) == [421, *world, 2]
    assert tokenizer.encode("word words", False) == [422, *own.encode(" words")]
    assert tokenizer.vocab_size == 423 and tokenizer.special_ids == {0, 1, 2, 421}
    assert tokenizer.decode([1, *hello, 420, 2]) == "hello<|tool|>"
    assert tokenizer.decode([1, *hello, 2], skip_special_tokens=False) == "<s> hello</s>"
    assert [tokenizer.token(i) for i in (1, 420, 999)] == ["<s>", "<|tool|>", ""]
    pieces = [*map(tokenizer.vocabulary.piece, (1, 420, 999, world[0], own.piece_to_id("<0x0A>")))]
    assert pieces == ["<s>", "<|tool|>", "", own.id_to_piece(world[0]), "<0x0A>"]


def test_the_longest_added_token_is_found():
    rng = random.Random(3)
    for _ in range(200):
        texts = {"".join(rng.choice("ab|") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(0, 8))}
        plain = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"
        text = "".join(rng.choice("ab|c") for _ in range(60))
        assert splitter([AddedToken(text) for text in texts]).split(text) == re.split(f"({plain})", text)


def test_spaces_after_added_tokens(tmp_path):
    """By default every text between them begins with a space, as SentencePiece has it; else only the first one."""
    for config, wanted in [({}, "▁a ▁a"), ({"legacy": False}, "▁a a"), ({"add_prefix_space": False}, "a a")]:
        path, own = train(tmp_path, config)
        tokenizer = Tokenizer.load(path)
        ids = tokenizer.encode("a</s>a", add_special_tokens=False)
        assert [own.id_to_piece(i) for i in ids] == [*wanted.split()[:1], "</s>", *wanted.split()[1:]]
        assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
        assert tokenizer.encode("</s>a", add_special_tokens=False) == ids[1:]


def test_older_files_beside_it(tmp_path):
    path, _ = train(tmp_path, {"add_bos_token": False, "chat_template": "{{ eos_token }}"})
    (path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 421, "<extra>": 420}))
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("<|im_end|><extra>") == [421, 420]
    assert 421 in tokenizer.special_ids and 420 not in tokenizer.special_ids
    assert tokenizer.apply_chat_template([]) == "<|im_end|>"


def test_streams(llama):
    path, own = llama
    tokenizer, rng = Tokenizer.load(path), random.Random(1)
    runs = [own.encode(text) for text in CORPUS]
    runs += [[rng.randrange(tokenizer.vocab_size) for _ in range(40)] for _ in range(200)]
    runs += [[rng.randrange(4, 260) for _ in range(20)] for _ in range(50)]  # bytes, most of them no characters
    for ids in runs:
        for skip in (True, False):
            stream = TextStream(tokenizer, SamplingParams(skip_special_tokens=skip))
            shown = [stream.append([token_id]) for token_id in ids] + [stream.finish()]
            assert "".join(shown) == tokenizer.decode(ids, skip_special_tokens=skip)
            after = TextStream(tokenizer, SamplingParams(skip_special_tokens=skip), own.encode("hello"))
            after.append(ids)
            after.finish()
            assert after.text in ("".join(shown), " " + "".join(shown))
    for text in CORPUS:
        stream = TextStream(tokenizer, SamplingParams())
        shown = [stream.append([token_id]) for token_id in own.encode(text)]
        assert not any("\ufffd" in piece for piece in shown) and stream.text == own.decode(own.encode(text))


def test_half_a_surrogate_pair(llama):
    with pytest.raises(ValueError, match="surrogate"):
        Tokenizer.load(llama[0]).encode("a\ud800")


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        (b"", {}, "tokenizer.model is not a SentencePiece model"),
        (b"aGVsbG8= 0\nd29ybGQ= 1\n", {}, "tokenizer.model is not a SentencePiece model"),
        (None, {"bos_token": "<nowhere>", "add_bos_token": True}, "there is no bos_token '<nowhere>'"),
        (None, {"added_tokens_decoder": {"x": {"content": "y"}}}, r"added_tokens_decoder\['x'\] must map an id"),
        (None, {"added_tokens_decoder": {"7": "y"}}, r"added_tokens_decoder\['7'\] must map an id"),
    ],
)
def test_broken_files_are_named(tmp_path, llama, data, config, message):
    (tmp_path / "tokenizer.model").write_bytes((llama[0] / "tokenizer.model").read_bytes() if data is None else data)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_ends_of_words_are_refused(tmp_path):
    path, _ = train(tmp_path, treat_whitespace_as_suffix=True)
    with pytest.raises(ValueError, match="treat_whitespace_as_suffix"):
        Tokenizer.load(path)
