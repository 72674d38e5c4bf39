"""LLM(journal=PATH): what a script has finished is read back by its next run."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import SCRIPTS, run_world

from infer import LLM, RequestOutput, SamplingParams
from infer.journal import Journal
from infer.outputs import CompletionOutput, Logprob
from infer.request import Request

PROMPTS = [[10 + i, 20 + i, 30 + i] for i in range(6)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=8, logprobs=2),
    SamplingParams(temperature=1.0, max_tokens=8, n=3),
    SamplingParams(temperature=1.0, max_tokens=8, seed=3, prompt_logprobs=1),
] * 2


@pytest.fixture
def build(checkpoint_dirs: dict[str, Path]) -> Iterator[Callable[..., LLM]]:
    """Builds an LLM, after closing the one before."""
    built: list[LLM] = []

    def make(**kwargs: Any) -> LLM:
        for llm in built:
            llm.close()
        settings = {"model": checkpoint_dirs["llama"], "kv_cache_memory_bytes": "16M", "num_threads": 1, **kwargs}
        built.append(LLM(**settings))
        return built[-1]

    yield make
    for llm in built:
        llm.close()


def count_submits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the requests that the engine gets."""
    submitted: list[str] = []
    submit = llm.engine.submit

    def counted(request: Request) -> None:
        submitted.append(request.request_id)
        submit(request)

    monkeypatch.setattr(llm.engine, "submit", counted)
    return submitted


def generate(llm: LLM) -> list[RequestOutput]:
    return llm.generate(PROMPTS, PARAMS, use_tqdm=False)


def test_the_next_run_computes_only_the_rest(build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    undisturbed = generate(build())
    assert generate(build(journal=path)) == undisturbed
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + len(PROMPTS)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:30])  # three prompts, whichever were done first, and a torn one
    llm = build(journal=path)
    submitted = count_submits(llm, monkeypatch)
    assert generate(llm) == undisturbed, "the same outputs, of those read back and of the others, in the same order"
    assert len(submitted) == len(PROMPTS) - 3
    assert generate(llm) != undisturbed, "the script's second call is another one: unseeded prompts draw anew"
    assert len(path.read_bytes().splitlines()) == 1 + 2 * len(PROMPTS)


def test_other_prompts_and_parameters_are_computed(build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    llm = build(journal=path)
    greedy = SamplingParams(temperature=0, max_tokens=4)
    llm.generate(PROMPTS[:2], greedy, use_tqdm=False)
    llm = build(journal=path)
    submitted = count_submits(llm, monkeypatch)
    longer = SamplingParams(temperature=0, max_tokens=5)
    first, second = llm.generate([PROMPTS[0], PROMPTS[3]], [longer, greedy], use_tqdm=False)
    assert submitted == ["0", "1"]
    assert len(first.outputs[0].token_ids) == 5
    assert second.prompt_token_ids == PROMPTS[3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "qwen2"}, "another model"),
        ({"seed": 1}, r"another seed \(0, now 1\)"),
        ({"dtype": "bfloat16"}, r"another dtype \('float32', now 'bfloat16'\)"),
        ({"max_model_len": 64}, r"another max_model_len \(512, now 64\)"),
    ],
)
def test_a_journal_of_other_settings_is_refused(
    build, checkpoint_dirs, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "journal"
    build(journal=path).close()
    if "model" in change:
        change = {"model": checkpoint_dirs[change["model"]]}
    with pytest.raises(ValueError, match=words):
        build(journal=path, **change)
    build(journal=path, tensor_parallel_size=1, max_num_seqs=3)  # what leaves the outcome as it is, may differ


def test_what_is_no_journal_is_refused_and_left_as_it_is(build, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    for content, words in [
        (b'{"custom_id": 1}\n', "is no journal"),
        (b'["journal", "settings"]\n', "is no journal"),
        (b'{"journal": 2, "settings": {}}\n', "of version 2"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            build(journal=path)
        assert path.read_bytes() == content


def test_failed_prompts_are_not_kept_and_odd_numbers_are(tmp_path: Path) -> None:
    path, settings = tmp_path / "journal", {"model": "m"}
    requests = [
        Request(request_id=str(i), prompt_token_ids=[1, 2], params=SamplingParams(), seed=5) for i in range(2)
    ]
    logprobs = [{3: Logprob(-math.inf, 9, "a"), 4: Logprob(math.nan, 1, "\u2028")}]
    fine = CompletionOutput(0, "text\n", [3], logprobs, "stop", "end")
    failed = CompletionOutput(0, "", [], None, "error", None, "no token could be drawn")
    journal = Journal(path, settings)
    for request, choice in zip(requests, (fine, failed), strict=True):
        journal.add(request, RequestOutput(request.request_id, None, [1, 2], [choice], num_cached_tokens=1))
    journal.close()
    journal = Journal(path, settings)
    assert len(journal) == 1
    kept, other = (RequestOutput(request.request_id, None, [1, 2], []) for request in requests)
    assert [journal.recall(requests[0], kept), journal.recall(requests[1], other)] == [True, False]
    (choice,) = kept.outputs
    assert (kept.finished, kept.num_cached_tokens) == (True, 1)
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("text\n", "stop", "end")
    assert choice.logprobs is not None
    assert choice.logprobs[0][3] == logprobs[0][3]
    assert math.isnan(choice.logprobs[0][4].logprob)
    journal.close()


def test_a_line_that_is_no_entry_is_named(tmp_path: Path) -> None:
    path, settings = tmp_path / "journal", {"model": "m"}
    Journal(path, settings).close()
    with open(path, "ab") as file:
        file.write(b'{"key": "zz"}\n{}\n')
    with pytest.raises(ValueError, match="line 2 is no entry of a journal"):
        Journal(path, settings)


def test_a_killed_script_goes_on_after_torchruns_restart(checkpoint_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Rank 0 is killed with -9 in the middle, twice; the last generation's results are an undisturbed run's."""
    script, model = SCRIPTS / "journaled.py", checkpoint_dirs["llama"]
    plain, resumed = tmp_path / "plain.json", tmp_path / "resumed.json"
    undisturbed = run_world(script, model, plain, tmp_path / "journal1", 0, ranks=2, timeout=120)
    assert undisturbed.returncode == 0, undisturbed.report()
    journal = tmp_path / "journal2"
    result = run_world(script, model, resumed, journal, 2, ranks=2, timeout=240, restarts=2)
    assert result.returncode == 0, result.report()
    assert {log.attempt for log in result.ranks} == {0, 1, 2}
    assert json.loads(resumed.read_bytes()) == json.loads(plain.read_bytes())
    keys = [json.loads(line)["key"] for line in journal.read_bytes().splitlines()[1:]]
    assert len(set(keys)) == len(keys) == 24, "nothing was computed twice"
