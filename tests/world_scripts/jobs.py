"""What tests ask of a world, and what it answers: JSON files between pytest and the script run_jobs.py. No torch."""

from typing import Any

import msgspec

from infer.request import SamplingParams


class Run(msgspec.Struct, kw_only=True):
    """Prompts to complete. alone: one after the other, each by itself; else all in one call."""

    name: str
    prompts: list[list[int]]
    params: list[SamplingParams]  # one a prompt
    alone: bool = False


class Workload(msgspec.Struct, kw_only=True):
    """Random requests through the engine, `num_aborts` of which are aborted on their way."""

    name: str
    seed: int
    num_requests: int
    num_aborts: int


class Job(msgspec.Struct, kw_only=True):
    """One engine: LLM(**llm), and what to do with it."""

    name: str
    llm: dict[str, Any]
    runs: list[Run] = []
    workloads: list[Workload] = []


class Choice(msgspec.Struct, kw_only=True):
    """One completion. logprobs: per token {token id: (log-probability, rank)}, the drawn token first."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, tuple[float, int]]] | None = None


class Completion(msgspec.Struct, kw_only=True):
    choices: list[Choice]
    prompt_logprobs: list[dict[int, tuple[float, int]] | None] | None = None
    num_cached_tokens: int = 0


class WorkloadResult(msgspec.Struct, kw_only=True):
    """tokens: request id -> its choices' tokens, as far as they came; finish: its choices' finish reasons."""

    tokens: dict[str, list[list[int]]]
    finish: dict[str, list[str | None]]
    aborted: list[str]
    max_tokens: dict[str, int]


class JobResult(msgspec.Struct, kw_only=True):
    runs: dict[str, list[Completion]]
    workloads: dict[str, WorkloadResult]
    num_preemptions: int
    seconds: float


def read_jobs(path: str) -> list[Job]:
    with open(path, "rb") as file:
        return msgspec.json.decode(file.read(), type=list[Job])


def read_results(path: str) -> dict[str, JobResult]:
    """Results by the name of their job."""
    with open(path, "rb") as file:
        return msgspec.json.decode(file.read(), type=dict[str, JobResult])


def write_json(path: str, value: Any) -> None:
    with open(path, "wb") as file:
        file.write(msgspec.json.encode(value))
