"""/tokenize and /detokenize."""

import http.client
import json
from urllib.parse import urlsplit

import pytest
from fake_engine import MAX_MODEL_LEN, MODEL

USER = [{"role": "user", "content": "hello"}]


def exchange(served, path, body):
    connection = http.client.HTTPConnection(urlsplit(served[0]).netloc, timeout=20)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        data = reply.read()
    finally:
        connection.close()
    assert reply.status == 200 or len(data) < 3000, "an error repeats its input"
    return reply.status, json.loads(data)


def test_a_text(served, tokenizer):
    text = "naïve 你好 😀<|im_end|>"
    ids = tokenizer.encode(text)
    status, reply = exchange(served, "/tokenize", {"model": MODEL, "prompt": text})
    assert (status, reply) == (
        200, {"count": len(ids), "max_model_len": MAX_MODEL_LEN, "tokens": ids, "token_strs": None}
    )  # fmt: skip
    _, reply = exchange(served, "/tokenize", {"prompt": text, "return_token_strs": True, "model": None})
    assert reply["token_strs"] == [tokenizer.vocabulary.piece(token) for token in ids]
    assert "\ufffd" not in "".join(reply["token_strs"]) and reply["token_strs"][-1] == "<|im_end|>"
    assert exchange(served, "/detokenize", {"model": MODEL, "tokens": ids}) == (200, {"prompt": text})
    assert exchange(served, "/tokenize", {"prompt": ""})[1]["count"] == 0
    assert exchange(served, "/detokenize", {"tokens": []}) == (200, {"prompt": ""})


def test_a_text_longer_than_the_context(served, tokenizer):
    text = "hello world " * 5000
    status, reply = exchange(served, "/tokenize", {"prompt": text, "return_token_strs": True})
    assert status == 200 and reply["count"] > MAX_MODEL_LEN and "".join(reply["token_strs"]) == text.replace(" ", "Ġ")
    assert exchange(served, "/detokenize", {"tokens": reply["tokens"]})[1]["prompt"] == text


def test_a_conversation(served, tokenizer):
    _, reply = exchange(served, "/tokenize", {"messages": USER})
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert reply["tokens"] == tokenizer.encode(text, add_special_tokens=False)
    _, without = exchange(served, "/tokenize", {"messages": USER, "add_generation_prompt": False})
    assert tokenizer.decode(without["tokens"], False) == text.removesuffix("<|im_start|>assistant\n")
    going_on = [*USER, {"role": "assistant", "content": "The"}]
    _, reply = exchange(served, "/tokenize", {"messages": going_on, "continue_final_message": True})
    assert tokenizer.decode(reply["tokens"], False).endswith("assistant\nThe")


def test_it_is_what_the_generating_routes_use(served):
    _, reply = exchange(served, "/tokenize", {"messages": USER})
    exchange(served, "/v1/chat/completions", {"messages": USER, "max_tokens": 1})
    assert served[1].requests[-1].prompt_token_ids == reply["tokens"]
    _, reply = exchange(served, "/tokenize", {"prompt": "hello world"})
    exchange(served, "/v1/completions", {"prompt": "hello world", "max_tokens": 1})
    assert served[1].requests[-1].prompt_token_ids == reply["tokens"]


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/tokenize", {}, 400, "prompt is missing; give prompt (a text) or messages"),
        ("/tokenize", {"prompt": "a", "messages": USER}, 400, "not both"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt: expected str"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "does not exist"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, 400, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a" * (2 << 20)}, 400, "this route takes 1048576"),
        ("/tokenize", {"messages": []}, 400, "messages is empty"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * (2 << 20)}]}, 400, "this route takes 1048576"),
        ("/tokenize", {"messages": USER, "chat_template": "x"}, 400, "never from a request"),
        ("/tokenize", {"messages": USER, "chat_template_kwargs": {"messages": []}}, 400, "must not set messages"),
        ("/tokenize", {"messages": [{"role": "robot"}]}, 400, "messages[0].role"),
        ("/detokenize", {}, 400, "tokens is missing"),
        ("/detokenize", {"tokens": "abc"}, 400, "tokens: expected array"),
        ("/detokenize", {"tokens": [1, True]}, 400, "tokens[1]: expected int"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens holds -1"),
        ("/detokenize", {"tokens": [5, 100_000]}, 400, "tokens holds 100000"),
        ("/detokenize", {"tokens": [2**63]}, 400, "tokens"),
        ("/detokenize", {"tokens": [5] * (1 << 20) + [5]}, 400, "tokens may hold 1048576 ids"),
        ("/detokenize", {"tokens": [5], "user": "me", "x": 1}, 400, "unknown field 'x'"),
    ],
)
def test_what_is_refused(served, path, body, status, text):
    found, reply = exchange(served, path, body)
    assert (found, set(reply["error"])) == (status, {"message", "type", "param", "code"}), reply
    assert text in reply["error"]["message"], reply
