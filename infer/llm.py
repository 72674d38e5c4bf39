"""LLM: the batch script's engine, with vLLM's names."""

import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from tqdm import tqdm

from infer.config import EngineConfig
from infer.engine.loop import Engine
from infer.engine.startup import check
from infer.journal import Journal, journal_settings
from infer.launch import RankEnv
from infer.models.source import tokenizer_path
from infer.outputs import CompletionOutput, Logprob, RequestOutput
from infer.process import Process
from infer.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs, check_prompt
from infer.serve.text import TextStream, Tokenizer
from infer.structured import GrammarChecker


class TokensPrompt(TypedDict):
    """A prompt given as token ids."""

    prompt_token_ids: list[int]


Prompt = str | list[int] | TokensPrompt
Message = dict[str, Any]


@dataclass
class _Job:
    """A request on its way."""

    request: Request
    output: RequestOutput
    streams: list[TextStream]
    open_choices: set[int] = field(default_factory=set)


class LLM:
    """A model over all ranks of torchrun's world, for scripts.

        llm = LLM(model="models/SmolLM2-135M-Instruct", pipeline_parallel_size=2)
        for output in llm.generate(["Hello"], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

    Every engine flag of the command line is a keyword argument (EngineConfig). Rank 0 goes on past the constructor; the
    other ranks serve inside it and end with rank 0. Raises ValueError for what cannot be built, on rank 0; the others
    then wait for the next LLM of the script.

    journal: a file that rank 0 writes each finished prompt to, so that the same script, run again after it was killed
    or by torchrun's --max-restarts, computes only the rest.
    """

    def __init__(
        self, model: str | os.PathLike[str], *, journal: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> None:
        self._process = Process.join(RankEnv.from_environ())
        if self._process.engine is not None:
            raise ValueError("an LLM is open in this process; call its close() before building another")
        config = EngineConfig.from_kwargs(model=model, **kwargs)
        # Whatever can be wrong is found before any rank is asked.
        path, model_config = check(config, self._process.world.size, Path(sys.argv[0]).name)
        tokenizer_dir = tokenizer_path(config, path)
        self.tokenizer = Tokenizer.load(tokenizer_dir)
        self._grammars = GrammarChecker(tokenizer_dir)
        self._journal: Journal | None = None
        if journal is not None:
            max_model_len = config.max_model_len or model_config.max_position
            settings = journal_settings(config, path, tokenizer_dir, model_config.dtype, max_model_len)
            self._journal = Journal(Path(journal), settings)
        try:
            self._engine = self._process.build_engine(config)
        except BaseException:
            self._close_journal()
            raise
        self._pause()
        self._open = True
        self._seeds = random.Random(config.seed)
        self._num_requests = 0

    # ------------------------------------------------------------------ use

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts: a string, a list of token ids or {"prompt_token_ids": [...]}, or a list of such.

        sampling_params: one for all, or one each. priority: one each, with scheduling_policy="priority"; the lowest
        runs first. Returns an output per prompt, in their order; with a journal, each is on the disk then. Raises
        ValueError, naming the prompt, before anything runs.
        """
        self._check_open()
        many: list[Any] = [prompts] if _is_one_prompt(prompts) else list(prompts)
        params, priorities = self._params_for(many, sampling_params), self._priorities_for(many, priority)
        given = enumerate(zip(many, params, priorities, strict=True))
        jobs = [self._prepare(index, prompt, p, rank) for index, (prompt, p, rank) in given]
        self._run(jobs, use_tqdm)
        return [job.output for job in jobs]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, or a list of conversations, rendered by the model's chat template."""
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], dict) else messages
        texts = [
            self.tokenizer.apply_chat_template(
                list(conversation), add_generation_prompt=add_generation_prompt, **(chat_template_kwargs or {})
            )
            for conversation in conversations
        ]
        prompts: list[Prompt] = [
            TokensPrompt(prompt_token_ids=self.tokenizer.encode(text, add_special_tokens=False)) for text in texts
        ]
        outputs = self.generate(prompts, sampling_params, use_tqdm)
        for output, text in zip(outputs, texts, strict=True):
            output.prompt = text
        return outputs

    def close(self) -> None:
        """Ends the engine. The other ranks wait for the next LLM of this script."""
        if self._open:
            self._grammars.close()
            self._close_journal()
            self._engine.close()
            self._open, self._process.engine = False, None

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._engine.broken is not None and self._process.world.size > 1:
            return  # what ends the script is that error, not that nothing can be closed any more
        self.close()

    @property
    def engine(self) -> Engine:
        """The engine below, for figures."""
        return self._engine

    # ------------------------------------------------------------------ a request

    def _params_for(
        self, prompts: list[Any], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(params)} sampling_params; give one, or one each")
        return list(params)

    def _priorities_for(self, prompts: list[Any], priority: Sequence[int] | None) -> list[int]:
        if priority is None:
            return [0] * len(prompts)
        if self._engine.config.scheduling_policy != "priority":
            raise ValueError('priority needs an LLM built with scheduling_policy="priority"')
        if len(priority) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(priority)} priorities; give one each")
        return list(priority)

    def _prepare(self, index: int, prompt: Any, params: SamplingParams, priority: int) -> _Job:
        text, token_ids = None, prompt
        if isinstance(prompt, str):
            text, token_ids = prompt, self.tokenizer.encode(prompt)
        elif isinstance(prompt, dict):
            if set(prompt) != {"prompt_token_ids"}:
                raise ValueError(f"prompt {index} has the keys {sorted(prompt)}; it takes prompt_token_ids alone")
            token_ids = prompt["prompt_token_ids"]
        if not isinstance(token_ids, list) or not all(type(token) is int for token in token_ids):
            raise ValueError(f"prompt {index} must be a string or a list of token ids, not {type(token_ids).__name__}")
        try:
            check_prompt(token_ids, params, self._engine.model_config.vocab_size, self._engine.max_model_len)
            if params.structured_outputs is not None:
                self._grammars.check(params.structured_outputs)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        self._num_requests += 1
        request = Request(
            request_id=str(self._num_requests - 1),
            prompt_token_ids=token_ids,
            params=params,
            seed=params.seed if params.seed is not None else self._seeds.getrandbits(63),
            eos_token_ids=list(self._engine.model_config.eos_token_ids),
            bad_words_token_ids=self.tokenizer.bad_words_token_ids(params.bad_words) if params.bad_words else [],
            priority=priority,
        )
        return self._job(request, text)

    def _job(self, request: Request, text: str | None) -> _Job:
        params = request.params
        choices = [
            CompletionOutput(index, logprobs=None if params.logprobs is None else []) for index in range(params.n)
        ]
        output = RequestOutput(request.request_id, text, request.prompt_token_ids, choices)
        streams = [TextStream(self.tokenizer, params, request.prompt_token_ids) for _ in choices]
        return _Job(request, output, streams, set(range(params.n)))

    # ------------------------------------------------------------------ the run

    def _run(self, jobs: list[_Job], use_tqdm: bool) -> None:
        total = len(jobs)
        jobs = [job for job in jobs if not self._recall(job)]
        by_id = {job.request.request_id: job for job in jobs}
        engine, num_open = self._engine, len(jobs)
        bar = tqdm(
            total=total, initial=total - num_open, desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True
        )
        self._process.world.watchdog.phase("generating")
        try:
            for job in jobs:
                engine.submit(job.request)
            num_tokens = 0
            while num_open:
                for output in engine.step():
                    job = by_id[output.request_id]
                    if output.index not in job.open_choices:
                        continue
                    num_tokens += len(output.token_ids)
                    self._take(job, output)
                    if not job.open_choices and not job.output.finished:
                        job.output.finished = True
                        if self._journal is not None:
                            self._journal.add(job.request, job.output)
                        num_open -= 1
                        bar.update()
                        rate = num_tokens / max(bar.format_dict["elapsed"], 1e-9)
                        bar.set_postfix_str(f"{rate:.1f} output tokens/s", refresh=False)
        finally:
            for job in jobs:  # after an interrupt or an error; nothing is open otherwise
                if job.open_choices:
                    engine.abort(job.request.request_id)
            bar.close()
            self._pause()
            if self._journal is not None:
                self._journal.flush()

    def _pause(self) -> None:
        """Between two calls the script may do as it likes, holding Python's lock too."""
        self._process.world.watchdog.work_out(False)
        self._process.world.watchdog.phase("between calls", slow=True)

    def _recall(self, job: _Job) -> bool:
        """Takes the job's output from the journal, where an earlier run left it."""
        if self._journal is None or not self._journal.recall(job.request, job.output):
            return False
        job.open_choices.clear()
        return True

    def _take(self, job: _Job, output: Output) -> None:
        choice, stream = job.output.outputs[output.index], job.streams[output.index]
        job.output.num_cached_tokens = max(job.output.num_cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            job.output.prompt_logprobs = [self._logprobs(entry) for entry in output.prompt_logprobs]
        stream.append(output.token_ids, stopped=output.finish_reason is FinishReason.STOP)
        choice.token_ids += output.token_ids
        if choice.logprobs is not None:
            choice.logprobs += [self._logprobs(entry) or {} for entry in output.logprobs or []]
        if stream.stop_reason is not None:
            if output.finish_reason is None:
                self._engine.abort(job.request.request_id, output.index)
            self._end(job, output.index, "stop", stream.stop_reason)
        elif output.finish_reason is not None:
            stream.finish()
            choice.error = output.error
            reason = stream.stop_reason if stream.stop_reason is not None else output.stop_reason
            finish = "stop" if stream.stop_reason is not None else output.finish_reason.value
            self._end(job, output.index, finish, reason)

    def _end(self, job: _Job, index: int, finish_reason: str, stop_reason: int | str | None) -> None:
        choice, stream = job.output.outputs[index], job.streams[index]
        if job.request.params.detokenize:
            del choice.token_ids[stream.num_tokens :]
            if choice.logprobs is not None:
                del choice.logprobs[stream.num_tokens :]
        choice.text, choice.finish_reason, choice.stop_reason = stream.text, finish_reason, stop_reason
        job.open_choices.discard(index)

    def _logprobs(self, entry: TokenLogprobs | None) -> dict[int, Logprob] | None:
        if entry is None:
            return None
        return {
            token: Logprob(logprob, rank, self.tokenizer.token(token))
            for token, logprob, rank in zip(entry.tokens, entry.logprobs, entry.ranks, strict=True)
        }

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError("this LLM is closed; build another")


def _is_one_prompt(prompts: Any) -> bool:
    if isinstance(prompts, (str, dict)):
        return True
    return isinstance(prompts, list) and bool(prompts) and all(type(token) is int for token in prompts)
