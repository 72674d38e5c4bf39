"""Run by torchrun: builds one LLM after the other, does each job's runs, and writes the results.

torchrun ... run_jobs.py JOBS.json RESULTS.json
"""

import random
import sys
import time

from world_scripts.jobs import (
    Choice,
    Completion,
    Job,
    JobResult,
    Run,
    Workload,
    WorkloadResult,
    read_jobs,
    write_json,
)

from infer import LLM
from infer.outputs import Logprob, RequestOutput
from infer.request import Output, Request, SamplingParams

Entry = dict[int, tuple[float, int]]


def main() -> None:
    jobs, results_path = read_jobs(sys.argv[1]), sys.argv[2]
    results = {}
    for job in jobs:
        results[job.name] = run_job(job)
        write_json(results_path, results)  # what there is, should a later job fail


def run_job(job: Job) -> JobResult:
    started = time.monotonic()
    with LLM(**job.llm) as llm:
        runs = {run.name: run_prompts(llm, run) for run in job.runs}
        workloads = {work.name: run_workload(llm, work) for work in job.workloads}
        llm.engine.scheduler.check_idle()
        preemptions = llm.engine.scheduler.stats.num_preemptions
    seconds = time.monotonic() - started
    print(f"{job.name}: {seconds:.1f} s", flush=True)
    return JobResult(runs=runs, workloads=workloads, num_preemptions=preemptions, seconds=seconds)


def run_prompts(llm: LLM, run: Run) -> list[Completion]:
    if not run.alone:
        return [completion(output) for output in llm.generate(run.prompts, run.params, use_tqdm=False)]
    outputs = []
    for prompt, params in zip(run.prompts, run.params, strict=True):
        outputs += llm.generate([prompt], params, use_tqdm=False)
    return [completion(output) for output in outputs]


def completion(output: RequestOutput) -> Completion:
    choices = [
        Choice(
            text=choice.text,
            token_ids=choice.token_ids,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            logprobs=None if choice.logprobs is None else [entry(logprobs) for logprobs in choice.logprobs],
        )
        for choice in output.outputs
    ]
    prompt = output.prompt_logprobs
    return Completion(
        choices=choices,
        prompt_logprobs=None if prompt is None else [p if p is None else entry(p) for p in prompt],
        num_cached_tokens=output.num_cached_tokens,
    )


def entry(logprobs: dict[int, Logprob]) -> Entry:
    return {token: (logprob.logprob, logprob.rank) for token, logprob in logprobs.items()}


def run_workload(llm: LLM, work: Workload) -> WorkloadResult:
    """Requests that arrive over time, some of which share a beginning; aborts fall at random moments."""
    rng = random.Random(work.seed)
    requests = [random_request(rng, str(i), llm.engine.model_config.vocab_size) for i in range(work.num_requests)]
    doomed = set(rng.sample([request.request_id for request in requests], work.num_aborts))
    patient = {name for name in sorted(doomed) if rng.random() < 0.5}  # aborted only once they have a token
    result = WorkloadResult(
        tokens={request.request_id: [[] for _ in range(request.params.n)] for request in requests},
        finish={request.request_id: [None] * request.params.n for request in requests},
        aborted=[],
        max_tokens={request.request_id: request.params.max_tokens or 0 for request in requests},
    )
    engine, arrived, step = llm.engine, 0, 0
    submitted: set[str] = set()
    while arrived < len(requests) or engine.has_work:
        for request in requests[arrived : arrived + rng.randrange(0, 25)]:
            engine.submit(request)
            submitted.add(request.request_id)
            arrived += 1
        for victim in rng.sample(sorted(doomed), min(3, len(doomed))):
            started = any(result.tokens[victim])
            if victim not in submitted or (victim in patient and not started):
                continue
            doomed.remove(victim)
            if None in result.finish[victim]:  # one that has ended cannot be aborted any more
                engine.abort(victim)
                result.aborted.append(victim)
        if engine.has_work:
            for output in engine.step():
                take(result, output)
        step += 1
        assert step < 100 * len(requests), "the workload does not come to an end"
    engine.scheduler.check_idle()
    return result


def random_request(rng: random.Random, name: str, vocab_size: int) -> Request:
    beginning = [7 + i % 50 for i in range(48)]  # one that many share: three blocks
    shared = beginning[: rng.choice([0, 0, 20, 40, 48])]
    prompt = shared + [rng.randrange(3, vocab_size) for _ in range(rng.randrange(1, 30))]
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.8]),
        n=rng.choice([1, 1, 1, 2]),
        max_tokens=rng.randrange(1, 14),
        ignore_eos=True,
    )
    return Request(request_id=name, prompt_token_ids=prompt, params=params, seed=rng.getrandbits(63), eos_token_ids=[1])


def take(result: WorkloadResult, output: Output) -> None:
    assert output.request_id not in result.aborted, f"{output.request_id} was aborted, yet a token came"
    assert result.finish[output.request_id][output.index] is None, f"{output.request_id} goes on after its end"
    result.tokens[output.request_id][output.index] += output.token_ids
    if output.finish_reason is not None:
        result.finish[output.request_id][output.index] = output.finish_reason.value


main()
