"""Requests that one engine has begun and another finishes: the same tokens, none twice, none missing. No torch."""

import random

import msgspec
import pytest
from fake_ranks import expected_tokens
from test_scheduler import finish, make, random_workload, request

from infer.request import FinishReason, Request, check_request

BEGUN = request("r", [3, 4, 5], n=2, max_tokens=8, ignore_eos=True)


def resume(r: Request, **output_token_ids: list[int]) -> Request:
    return msgspec.structs.replace(r, output_token_ids={int(k[1:]): v for k, v in output_token_ids.items()})


def run_for(simulation, requests, num_steps):
    """What came of them in so many steps: tokens and whether it is done, of every choice."""
    tokens = {(r.request_id, choice): [] for r in requests for choice in range(r.params.n)}
    done = set()
    for r in requests:
        simulation.scheduler.add(r)
    for _ in range(num_steps):
        for output in simulation.step() if simulation.scheduler.has_work else ():
            key = output.request_id, output.index
            assert output.token_index == len(tokens[key]) or not output.token_ids
            tokens[key] += output.token_ids
            done |= {key} if output.finish_reason is not None else set()
    return tokens, done


@pytest.mark.parametrize("seed", range(60))
def test_another_engine_ends_what_one_began(seed):
    _, simulation, requests = random_workload(seed)
    simulation.ranks.failing.clear()
    tokens, done = run_for(simulation, requests, random.Random(seed).randrange(1, 40))
    _, other, _ = random_workload(seed)
    other.ranks.failing.clear()
    for r in requests:
        left = {c: list(tokens[r.request_id, c]) for c in range(r.params.n) if (r.request_id, c) not in done}
        if left:
            begun = msgspec.structs.replace(r, output_token_ids=left)
            check_request(begun, 97, other.scheduler.max_model_len)
            other.scheduler.add(begun)
    for output in finish(other):
        key = output.request_id, output.index
        assert key not in done, "a choice that was done runs again"
        assert output.token_index == len(tokens[key])
        tokens[key] += output.token_ids
    other.scheduler.check_idle()
    for r in requests:
        for choice in range(r.params.n):
            assert tokens[r.request_id, choice] == expected_tokens(r, choice, simulation.scheduler.max_model_len)


def test_tokens_of_another_engine_count_as_output():
    simulation = make()
    whole = expected_tokens(BEGUN, 1, 64)
    simulation.scheduler.add(resume(BEGUN, _1=whole[:6]))
    outputs = finish(simulation)
    assert [output.token_index for output in outputs] == [6, 7]
    assert [output.token_ids[0] for output in outputs] == whole[6:]
    assert outputs[-1].finish_reason is FinishReason.LENGTH and {output.index for output in outputs} == {1}
    assert all(output.num_cached_tokens == 0 for output in outputs)


def test_who_started_is_told_once():
    simulation = make(max_num_seqs=1)
    for name in ("a", "b"):
        simulation.scheduler.add(request(name, [1, 2, 3], max_tokens=3, ignore_eos=True))
    simulation.step()
    assert simulation.scheduler.take_started() == ["a"]
    finish(simulation)
    assert simulation.scheduler.take_started() == ["b"]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (resume(BEGUN, _2=[]), "output_token_ids holds choice 2; the request has choices 0 to 1"),
        (resume(BEGUN, _0=[1] * 8), "choice 0 has 8 tokens already; it ends with 8"),
        (resume(BEGUN, _0=[97]), "token id 97"),
        (resume(BEGUN), "names no choice"),
    ],
)
def test_what_cannot_go_on(bad, told):
    with pytest.raises(ValueError, match=told):
        check_request(bad, 97, 64)
