"""A small byte-level tokenizer, and an engine that echoes prompts behind the real frontend process."""

import contextlib
import http.client
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from infer.config import ServerConfig
from infer.request import FinishReason, Output, Request, TokenLogprobs
from infer.serve.link import Abort, Bye, Closed, EngineLink, Hello, Outputs, Started, Submit
from infer.serve.spawn import FrontendHandle, start_frontend
from infer.serve.text import Tokenizer as InferTokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, this is a small test", "naïve café 你好 😀"] * 20
MODEL = "tiny"
MAX_MODEL_LEN = 256


def write_tokenizer(path: Path, **config: object) -> Path:
    """A byte-level BPE tokenizer directory with three special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool call>", special=False)])
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


class FakeEngine:
    """Answers every request with its own prompt, again and again, one token a step, until max_tokens or an abort.

    Choice k begins k tokens into the prompt. A prompt that has the end token ends there. delay: seconds a step. What
    another engine has begun it goes on with. is_stuck: it takes requests and says that they run, and no more.
    """

    def __init__(
        self, handle: FrontendHandle, tokenizer: InferTokenizer, generation: int = 0, identity: str = ""
    ) -> None:
        self.inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.generation = generation
        self.link = EngineLink.connect(
            handle.socket_path, self.inbox.put, generation=generation, identity=identity
        )  # fmt: skip
        self.is_stuck = False
        self.requests: list[Request] = []
        self.aborts: list[Abort] = []
        self.bye: Bye | None = None
        self.closed: Closed | None = None
        self.delay = 0.0
        self.tokens_per_step = 1
        self.fail_with: str | None = None
        self._vocab_size = tokenizer.vocab_size
        self._running: dict[tuple[str, int], tuple[Request, int]] = {}  # -> request, tokens so far
        self._queue: list[tuple[Request, bool]] = []  # whether it is to run alone
        self._alone: str | None = None  # does so
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def hello(self, model_name: str = MODEL) -> None:
        self.link.send(
            Hello(
                generation=self.generation, model_name=model_name, max_model_len=MAX_MODEL_LEN,
                vocab_size=self._vocab_size, eos_token_ids=[2],
            )
        )  # fmt: skip
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)
        self.link.close()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def _loop(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                while True:
                    self._take(self.inbox.get(timeout=0.0 if self._running else 0.01))
            self._admit()
            items = [] if self.is_stuck else [self._step(*key) for key in list(self._running)]
            if items:
                self.link.send(Outputs(items=items, generation=self.generation))
                time.sleep(self.delay)

    def _take(self, message: object) -> None:
        match message:
            case Submit(request=request, alone=alone):
                self.requests.append(request)
                self._queue.append((request, alone))
            case Abort(request_id=request_id, index=index):
                self.aborts.append(message)
                self._admit()  # in the order in which they came
                for key in list(self._running):
                    if key[0] == request_id and index in (None, key[1]):
                        del self._running[key]
            case Bye():
                self.bye = message
            case Closed():
                self.closed = message

    def _admit(self) -> None:
        """Starts what waits, as Scheduler does: what is to run alone first, one at a time."""
        while self._queue and self._alone is None:
            request, alone = next((item for item in self._queue if item[1]), self._queue[0])
            self._queue.remove((request, alone))
            self._alone = request.request_id if alone else None
            for choice in request.choices:
                done = (request.output_token_ids or {}).get(choice, [])
                self._running[request.request_id, choice] = (request, len(done))
            self.link.send(Started(request_ids=[request.request_id]))

    def _step(self, request_id: str, index: int) -> Output:
        if request_id == self._alone:
            self._alone = None
        request, done = self._running[request_id, index]
        prompt, params = request.prompt_token_ids, request.params
        if self.fail_with is not None:
            del self._running[request_id, index]
            return Output(
                request_id=request_id, index=index, finish_reason=FinishReason.ERROR, error=self.fail_with
            )
        count = min(self.tokens_per_step, params.max_tokens - done)
        tokens = [prompt[(index + done + i) % len(prompt)] for i in range(count)]
        finish = FinishReason.LENGTH if done + count == params.max_tokens else None
        if 2 in tokens and not params.ignore_eos:
            tokens, finish = tokens[: tokens.index(2) + 1], FinishReason.STOP
        if finish is None:
            self._running[request_id, index] = (request, done + count)
        else:
            del self._running[request_id, index]
        prompt_logprobs = None
        if index == 0 and done == 0 and params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(logprobs(token, params.prompt_logprobs) for token in prompt[1:])]
        return Output(
            request_id=request_id, index=index, token_ids=tokens, token_index=done, finish_reason=finish,
            num_cached_tokens=1,
            logprobs=None if params.logprobs is None else [logprobs(token, params.logprobs) for token in tokens],
            prompt_logprobs=prompt_logprobs,
        )  # fmt: skip


def logprobs(token: int, k: int) -> TokenLogprobs:
    """The drawn token is always the most likely one, and stands among the k most likely again."""
    likely = [token, *(10 + i for i in range(k) if 10 + i != token)][:k]
    ranks = range(len(likely))
    return TokenLogprobs([token, *likely], [-0.5, *(-0.5 - i for i in ranks)], [1, *(i + 1 for i in ranks)])


@contextlib.contextmanager
def frontend(tokenizer_path: Path, port: int = 0, **flags: Any) -> Iterator[FrontendHandle]:
    handle = start_frontend(ServerConfig(port=port, **flags), tokenizer_path, tokenizer_path, MODEL)
    try:
        yield handle
    finally:
        handle.stop(timeout=5)


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    finally:
        connection.close()


def wait_until(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)
