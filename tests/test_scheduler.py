"""The scheduler's policy, over ranks that check every batch. No torch, no real time."""

import random

import pytest
from fake_ranks import EOS, VOCAB_SIZE, FakeRanks, Simulation, expected_tokens

from infer.cache.blocks import BlockPool
from infer.engine.batch import NEW_BLOCKS, NO_TOKEN, SEQ, TEXT_ENDED, StepResult
from infer.engine.scheduler import Scheduler
from infer.request import FinishReason, Request, SamplingParams, StructuredOutputs

BLOCK_SIZE = 4  # small, so that short prompts fill blocks


def make(
    num_blocks=64, pp_size=1, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=64, failing=None, **options
):
    scheduler = Scheduler(
        BlockPool(num_blocks, BLOCK_SIZE),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        pp_size=pp_size,
        **options,
    )
    return Simulation(scheduler, FakeRanks(num_blocks, BLOCK_SIZE, failing))


def request(name, prompt, seed=0, **params):
    return Request(
        request_id=name, prompt_token_ids=list(prompt), params=SamplingParams(**params), seed=seed, eos_token_ids=[EOS]
    )


def finish(simulation, limit=10_000):
    """Runs to the end; the outputs."""
    outputs = []
    for _ in range(limit):
        if not simulation.scheduler.has_work:
            return outputs
        outputs += simulation.step()
    raise AssertionError(f"work is left after {limit} steps")


def tokens_of(outputs):
    found = {}
    for output in outputs:
        found.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    return found


# ------------------------------------------------------------------------------------------------ random workloads


def random_workload(seed):
    """A simulation of random sizes and requests for it; prompts share beginnings, blocks are scarce."""
    rng = random.Random(seed)
    max_model_len = rng.choice([16, 40, 64])
    chunked = rng.random() < 0.8
    beginnings = [[rng.randrange(VOCAB_SIZE) for _ in range(max_model_len)] for _ in range(2)]
    requests, failing = [], {}
    for i in range(rng.randrange(1, 24)):
        prompt = rng.choice(beginnings)[: rng.randrange(0, max_model_len // 2)]
        prompt = prompt + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, max_model_len // 2))]
        params = {
            "max_tokens": rng.choice([None, 1, rng.randrange(1, 30)]),
            "n": rng.choice([1, 1, 1, 2, 3]),
            "ignore_eos": rng.random() < 0.7,
            "prompt_logprobs": rng.choice([None, None, 2]),
            "stop_token_ids": rng.choice([None, [5, 6]]),
        }
        requests.append(request(f"r{i}", prompt[: max_model_len - 1], seed=rng.getrandbits(63), **params))
        if rng.random() < 0.1:
            failing[requests[-1].seed, rng.randrange(requests[-1].params.n)] = len(prompt) + rng.randrange(3)
    simulation = make(
        num_blocks=max_model_len // BLOCK_SIZE + rng.choice([0, 1, 5, 40]),
        pp_size=rng.choice([1, 2, 3]),
        max_num_seqs=rng.randrange(1, 10),
        max_num_batched_tokens=rng.choice([1, 3, 8, 32]) if chunked else max_model_len + rng.choice([0, 10]),
        max_model_len=max_model_len,
        failing=failing,
        enable_prefix_caching=rng.random() < 0.7,
        enable_chunked_prefill=chunked,
    )
    return rng, simulation, requests


def run_workload(rng, simulation, requests, abort_share, alone_share=0.0):
    """Requests arrive over time, some are to run alone, some are aborted. Returns outputs and the aborted (request id,
    choice)."""
    waiting, outputs, aborted = list(requests), [], set()
    for _ in range(20_000):
        for _ in range(rng.randrange(4)):
            if waiting:
                simulation.scheduler.add(waiting.pop(0), alone=alone_share > 0 and rng.random() < alone_share)
        if abort_share and rng.random() < abort_share:
            victim = rng.choice(requests)
            choice = rng.choice([None, 0])
            live = simulation.scheduler._choices.get(victim.request_id, {})
            aborted |= {(victim.request_id, c) for c in live if choice is None or c == choice}
            simulation.scheduler.abort(victim.request_id, choice)
        if simulation.scheduler.has_work:
            for output in simulation.step():
                assert (output.request_id, output.index) not in aborted, "an aborted choice goes on"
                outputs.append(output)
        elif not waiting:
            return outputs, aborted
    raise AssertionError("a request starves")


def watch_alone(simulation):
    """Checks every batch: until a token of it has come, what is to run alone does, and in its turn."""
    scheduler, plan = simulation.scheduler, simulation.scheduler.next

    def next_batch():
        alone, _ = list(scheduler._alone), scheduler.take_started()
        batch = plan()
        if batch is not None and alone:
            ids = {sequence.request.request_id for sequence, _ in scheduler._in_flight[-1][1].starts.values()}
            assert ids == {alone[0]} or not ids & set(alone), f"{ids} in one batch, while {alone} are to run alone"
            assert not set(scheduler.take_started()) - {alone[0]}, "another began meanwhile"
        return batch

    scheduler.next, simulation.in_order = next_batch, False


def check_outcome(simulation, requests, outputs, aborted):
    found, last = tokens_of(outputs), {}
    for output in outputs:
        assert last.get((output.request_id, output.index)) is None, "a choice goes on after its end"
        last[output.request_id, output.index] = output.finish_reason
    for r in requests:
        for choice in range(r.params.n):
            key = r.request_id, choice
            wanted = expected_tokens(r, choice, simulation.scheduler.max_model_len)
            fails_at = simulation.ranks.failing.get((r.seed, choice))
            failed = fails_at is not None and fails_at - len(r.prompt_token_ids) < len(wanted)
            if failed:
                wanted = wanted[: fails_at - len(r.prompt_token_ids)]
            if key in aborted:
                assert found.get(key, []) == wanted[: len(found.get(key, []))]
                continue
            assert found.get(key, []) == wanted
            if failed:
                assert last[key] == FinishReason.ERROR
            elif wanted[-1] in (r.params.stop_token_ids or ()) or (wanted[-1] == EOS and not r.params.ignore_eos):
                assert last[key] == FinishReason.STOP
            else:
                assert last[key] == FinishReason.LENGTH


def check_prompt_logprobs(requests, outputs):
    """All of a prompt's, once, with its first token."""
    told = {}
    for output in outputs:
        if output.prompt_logprobs is not None:
            assert output.request_id not in told and output.index == 0
            told[output.request_id] = output.prompt_logprobs
    started = {output.request_id for output in outputs if output.index == 0 and output.token_ids}
    for r in requests:
        if r.params.prompt_logprobs is None or r.request_id not in started:
            assert r.request_id not in told
            continue
        entries = told[r.request_id]
        assert entries[0] is None and len(entries) == len(r.prompt_token_ids)
        assert [entry.tokens[0] for entry in entries[1:]] == r.prompt_token_ids[1:]


@pytest.mark.parametrize(
    ("abort_share", "alone_share", "seeds"),
    [
        (0.0, 0.0, range(200)),
        (0.3, 0.0, range(200)),
        (0.1, 0.5, range(200)),
        pytest.param(0.1, 0.0, range(200, 3000), marks=pytest.mark.slow),
        pytest.param(0.1, 0.3, range(3000, 5000), marks=pytest.mark.slow),
    ],
)
def test_random_workloads(abort_share, alone_share, seeds):
    num_preemptions = num_hits = 0
    for seed in seeds:
        rng, simulation, requests = random_workload(seed)
        if alone_share:
            watch_alone(simulation)
        try:
            outputs, aborted = run_workload(rng, simulation, requests, abort_share, alone_share)
            check_outcome(simulation, requests, outputs, aborted)
            check_prompt_logprobs(requests, outputs)
            order = simulation.ranks.order
            assert alone_share or order == sorted(order), "a request overtook an earlier one"
            simulation.scheduler.check_idle()
        except (AssertionError, LookupError) as error:
            raise AssertionError(f"workload {seed}: {error}") from error
        num_preemptions += simulation.scheduler.stats.num_preemptions
        num_hits += simulation.scheduler.stats.prefix_cache_hits
    assert num_preemptions > 100 and num_hits > 1000, "the workloads are too easy to prove anything"


def test_the_ranks_forget_what_has_ended():
    rng, simulation, requests = random_workload(3)
    run_workload(rng, simulation, requests, 0.2)
    simulation.scheduler.add(request("last", [9, 9, 9], max_tokens=2, ignore_eos=True))
    finish(simulation)
    assert len(simulation.ranks.known) == 1  # the last one's end is told with the batch that follows


# ------------------------------------------------------------------------------------------------ policy, one by one


def test_a_long_prompt_runs_in_chunks_and_draws_once():
    simulation = make(max_num_batched_tokens=8)
    simulation.scheduler.add(request("a", range(2, 32), max_tokens=1, ignore_eos=True))
    outputs = finish(simulation)
    assert [batch.num_tokens for batch in simulation.batches] == [8, 8, 8, 6]
    assert len(outputs) == 1 and outputs[0].finish_reason == FinishReason.LENGTH


def test_alone_means_alone_and_the_others_have_a_batch_now_and_then():
    simulation = make()
    watch_alone(simulation)
    simulation.scheduler.add(request("old", [1, 2], ignore_eos=True, max_tokens=20))
    simulation.step()
    for i in range(9):
        simulation.scheduler.add(request(f"a{i}", [3, 4, i + 5], ignore_eos=True, max_tokens=20), alone=True)
    simulation.scheduler.add(request("new", [9], max_tokens=1, ignore_eos=True))
    came = [{output.request_id for output in simulation.step()} for _ in range(12)]
    first, second = {"old", "a0", "a1", "a2", "a3"}, {"a4", "a5", "a7"}
    assert came[:5] == [{"a0"}, {"a1"}, {"a2"}, {"a3"}, first]
    assert came[5:9] == [{f"a{i}"} for i in range(4, 8)]
    assert came[9] == first | second, "8 sequences run at most, and a7 has taken the place of the last of them"
    assert came[10] == {"a8"} and "new" not in came[11]
    assert {output.request_id for output in finish(simulation)} >= {"new", "old", "a8"}


def test_what_runs_alone_gets_the_blocks_it_needs():
    simulation = make(num_blocks=16)
    watch_alone(simulation)
    simulation.scheduler.add(request("old", range(2, 32), ignore_eos=True, max_tokens=30))
    simulation.step()
    simulation.scheduler.add(request("a", range(40, 80), ignore_eos=True, max_tokens=2), alone=True)
    assert [{output.request_id for output in simulation.step()} for _ in range(2)] == [set(), {"a"}]
    assert simulation.scheduler.stats.num_preemptions == 1
    finish(simulation)
    simulation.scheduler.check_idle()


def test_what_was_to_run_alone_may_be_aborted():
    simulation = make()
    simulation.scheduler.add(request("a", [1]), alone=True)
    simulation.scheduler.add(request("b", [2], max_tokens=1, ignore_eos=True))
    simulation.scheduler.abort("a")
    assert [output.request_id for output in finish(simulation)] == ["b"]


def test_chunks_of_one_prompt_fill_the_pipeline():
    simulation = make(max_num_batched_tokens=8, pp_size=3)
    simulation.scheduler.add(request("a", range(2, 32), max_tokens=1, ignore_eos=True))
    assert [simulation.scheduler.next().num_tokens for _ in range(3)] == [8, 8, 8]
    assert simulation.scheduler.next() is None  # three stages, three batches


def test_without_chunked_prefill_a_prompt_waits_for_a_batch_it_fits():
    simulation = make(max_num_batched_tokens=64, enable_chunked_prefill=False)
    for name in "abc":
        simulation.scheduler.add(request(name, [ord(name) % 50] * 40, max_tokens=2, ignore_eos=True))
    finish(simulation)
    assert simulation.batches[0].num_tokens == 40


@pytest.mark.parametrize(("pp_size", "num_running", "shares"), [(2, 7, [4, 3]), (3, 7, [3, 3, 1]), (3, 2, [1, 1])])
def test_decodes_are_divided_over_the_stages(pp_size, num_running, shares):
    simulation = make(pp_size=pp_size, max_num_batched_tokens=512, num_blocks=200)
    for i in range(num_running):
        simulation.scheduler.add(request(f"r{i}", [i + 2] * 3, max_tokens=40, ignore_eos=True))
    for _ in range(30):
        simulation.step()
    sizes = [len(batch.rows) for batch in simulation.batches[-12:]]
    assert sorted(sizes[: len(shares)]) == sorted(shares)
    assert all(sorted(sizes[i : i + len(shares)]) == sorted(shares) for i in range(0, 12 - len(shares), len(shares)))


@pytest.mark.parametrize("pp_size", [2, 3, 4])
def test_every_stage_is_busy_under_decoding(pp_size):
    """With enough requests the bubble is what filling and draining the pipeline costs, and no more."""
    simulation = make(pp_size=pp_size, max_num_seqs=4 * pp_size, max_num_batched_tokens=256, num_blocks=600,
                      max_model_len=128)  # fmt: skip
    for i in range(4 * pp_size):
        simulation.scheduler.add(request(f"r{i}", [2 + i] * 2, max_tokens=120, ignore_eos=True))
    finish(simulation)
    bubble = 1 - sum(simulation.busy) / (pp_size * simulation.now)
    assert bubble < 0.03, f"stages wait {bubble:.1%} of the time"


def test_mixed_arrivals_keep_the_stages_busy():
    simulation = make(pp_size=2, max_num_seqs=16, max_num_batched_tokens=64, num_blocks=1000, max_model_len=200)
    rng = random.Random(1)
    for i in range(80):
        prompt = [rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randrange(2, 60))]
        simulation.scheduler.add(request(f"r{i}", prompt, seed=i, max_tokens=rng.randrange(10, 60), ignore_eos=True))
    finish(simulation)
    assert 1 - sum(simulation.busy) / (2 * simulation.now) < 0.25


def test_the_youngest_is_preempted_and_comes_back():
    simulation = make(num_blocks=8, max_model_len=32, enable_prefix_caching=False)
    for name in "ab":
        simulation.scheduler.add(request(name, [ord(name) % 50] * 10, max_tokens=20, ignore_eos=True))
    outputs = finish(simulation)
    assert simulation.scheduler.stats.num_preemptions > 0
    ends = [output.request_id for output in outputs if output.finish_reason]
    assert ends == ["a", "b"]
    assert [len(tokens) for tokens in tokens_of(outputs).values()] == [20, 20]


def test_a_common_beginning_is_computed_once():
    simulation = make(num_blocks=64, max_num_batched_tokens=64)
    beginning = list(range(2, 34))
    simulation.scheduler.add(request("a", [*beginning, 40], max_tokens=3, ignore_eos=True))
    finish(simulation)
    simulation.scheduler.add(request("b", [*beginning, 41], max_tokens=3, ignore_eos=True))
    outputs = finish(simulation)
    assert outputs[0].num_cached_tokens == 32
    assert simulation.scheduler.stats.prefix_cache_hits == 32
    assert simulation.batches[-3].num_tokens == 1 and simulation.batches[-3].rows[0, NEW_BLOCKS] == 9


def test_a_full_hit_still_computes_a_token_in_a_block_of_its_own():
    simulation = make()
    for name in "ab":
        simulation.scheduler.add(request(name, range(2, 10), max_tokens=1, ignore_eos=True))
        finish(simulation)
    assert simulation.batches[-1].num_tokens == BLOCK_SIZE  # of 8 tokens, one block of 4 was found


def test_prompt_logprobs_do_not_read_the_cache():
    simulation = make()
    simulation.scheduler.add(request("a", range(2, 34), max_tokens=1, ignore_eos=True))
    finish(simulation)
    simulation.scheduler.add(request("b", range(2, 34), max_tokens=1, ignore_eos=True, prompt_logprobs=0))
    (output,) = finish(simulation)
    assert output.num_cached_tokens == 0
    assert [entry.tokens[0] for entry in output.prompt_logprobs[1:]] == list(range(3, 34))


def test_what_was_not_finite_leaves_the_prefix_cache():
    simulation = make(failing={(7, 0): 33})
    simulation.scheduler.add(request("a", range(2, 35), seed=7, max_tokens=5, ignore_eos=True))
    (output,) = finish(simulation)
    assert output.finish_reason == FinishReason.ERROR and "not finite" in output.error and not output.token_ids
    simulation.scheduler.add(request("b", range(2, 35), seed=8, max_tokens=5, ignore_eos=True))
    finish(simulation)
    assert simulation.scheduler.stats.prefix_cache_hits == 0


def test_another_s_blocks_that_were_not_finite_are_computed_anew():
    """Who found them in the cache runs again without them; only what fails by itself ends with an error."""
    simulation = make(failing={(8, 0): 33})
    simulation.scheduler.add(request("a", range(2, 35), seed=7, max_tokens=1, ignore_eos=True))
    finish(simulation)
    simulation.scheduler.add(request("b", range(2, 35), seed=8, max_tokens=5, ignore_eos=True))
    assert not simulation.step()
    (sequence,) = simulation.scheduler.running
    assert sequence.num_cached == sequence.num_computed == 0
    simulation.ranks.failing.clear()
    outputs = finish(simulation)
    assert [output.token_ids[0] for output in outputs] == expected_tokens(request("b", range(2, 35), seed=8), 0, 64)[:5]
    assert outputs[0].num_cached_tokens == 0 and outputs[-1].finish_reason == FinishReason.LENGTH
    simulation.scheduler.check_idle()


def test_what_fails_by_itself_fails_though_it_found_blocks():
    simulation = make(failing={(8, 0): 33})
    simulation.scheduler.add(request("a", range(2, 35), seed=7, max_tokens=1, ignore_eos=True))
    finish(simulation)
    simulation.scheduler.add(request("b", range(2, 35), seed=8, max_tokens=5, ignore_eos=True))
    (output,) = finish(simulation)
    assert output.finish_reason == FinishReason.ERROR and "not finite" in output.error
    simulation.scheduler.check_idle()


def test_what_was_not_finite_leaves_the_prefix_cache_though_preempted_meanwhile():
    """The result of the failing step comes after its blocks were given up."""
    simulation = make(pp_size=2, num_blocks=16, failing={(7, 0): 32})
    simulation.scheduler.add(request("a", range(2, 34), seed=7, max_tokens=5, ignore_eos=True))
    batch = simulation.scheduler.next()
    simulation.scheduler._preempt(simulation.scheduler.running[0])
    (output,) = simulation.scheduler.update(simulation.ranks.run(batch))
    assert output.finish_reason == FinishReason.ERROR
    simulation.scheduler.add(request("b", range(2, 34), seed=8, max_tokens=1, ignore_eos=True))
    finish(simulation)
    assert simulation.scheduler.stats.prefix_cache_hits == 0


def test_a_request_id_in_use_is_refused():
    simulation = make()
    simulation.scheduler.add(request("a", [2], max_tokens=1))
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        simulation.scheduler.add(request("a", [3], max_tokens=1))
    finish(simulation)
    simulation.scheduler.add(request("a", [3], max_tokens=1))
    finish(simulation)


def test_an_aborted_request_may_come_again_while_its_batch_is_in_flight():
    simulation = make(pp_size=2)
    simulation.scheduler.add(request("a", [2, 3], seed=1, max_tokens=2, ignore_eos=True))
    first = simulation.scheduler.next()
    simulation.scheduler.abort("a")
    again = request("a", [4, 5], seed=2, max_tokens=2, ignore_eos=True)
    simulation.scheduler.add(again)
    assert simulation.scheduler.update(simulation.ranks.run(first)) == []
    assert tokens_of(finish(simulation))["a", 0] == expected_tokens(again, 0, 64)
    simulation.scheduler.check_idle()


def test_aborting_the_unknown_is_nothing():
    simulation = make()
    simulation.scheduler.abort("nobody")
    assert not simulation.scheduler.has_work


def test_a_result_out_of_order_is_refused():
    simulation = make()
    simulation.scheduler.add(request("a", [2, 3], max_tokens=2))
    batch = simulation.scheduler.next()
    with pytest.raises(RuntimeError, match=f"step {batch.step + 1} with 1 tokens came where step {batch.step}"):
        simulation.scheduler.update(StepResult(batch.step + 1, [4], [None]))


def test_the_length_limits():
    simulation = make(max_model_len=16)
    simulation.scheduler.add(request("to the model's end", [2] * 10, seed=1, max_tokens=None, ignore_eos=True))
    simulation.scheduler.add(request("cut", [3] * 10, seed=2, max_tokens=100, ignore_eos=True))
    outputs = finish(simulation)
    assert {key: len(tokens) for key, tokens in tokens_of(outputs).items()} == {
        ("to the model's end", 0): 6,
        ("cut", 0): 6,
    }
    assert all(output.finish_reason in (None, FinishReason.LENGTH) for output in outputs)


def test_a_stop_token_is_named_and_an_end_token_is_not():
    simulation = make()
    everything = list(range(VOCAB_SIZE))
    simulation.scheduler.add(request("stop", [2], max_tokens=5, stop_token_ids=everything, ignore_eos=True))
    ends = request("end", [3], max_tokens=5)
    ends.eos_token_ids = everything
    simulation.scheduler.add(ends)
    stopped, ended = sorted(finish(simulation), key=lambda output: output.request_id, reverse=True)
    assert stopped.finish_reason == ended.finish_reason == FinishReason.STOP
    assert stopped.stop_reason == stopped.token_ids[0] and ended.stop_reason is None


def test_no_more_run_than_max_num_seqs():
    simulation = make(max_num_seqs=3)
    for i in range(9):
        simulation.scheduler.add(request(f"r{i}", [i + 2], max_tokens=4, ignore_eos=True))
    simulation.step()
    assert len(simulation.scheduler.running) == 3 and len(simulation.scheduler.waiting) == 6
    finish(simulation)
    assert {seq for batch in simulation.batches for seq in batch.rows[:, SEQ].tolist()} == set(range(9))


# ------------------------------------------------------------------------------------------------ priority


def with_priority(name, prompt, priority, **params):
    made = request(name, prompt, **params)
    made.priority = priority
    return made


def test_the_lowest_priority_number_runs_first_and_equals_in_their_order():
    simulation = make(max_num_seqs=1)
    simulation.scheduler.add(with_priority("running", [2], 9, max_tokens=3, ignore_eos=True))
    simulation.step()
    for name, priority in [("a", 5), ("b", 0), ("c", 5), ("d", -1), ("e", 0)]:
        simulation.scheduler.add(with_priority(name, [3], priority, max_tokens=2, ignore_eos=True))
    order = dict.fromkeys(output.request_id for output in finish(simulation))
    assert list(order) == ["running", "d", "b", "e", "a", "c"], "one that runs is not put aside for one that waits"


def test_the_last_in_order_is_preempted_though_it_came_first():
    simulation = make(num_blocks=5, max_model_len=20)
    first = with_priority("first", [2, 3, 4], 1, seed=1, max_tokens=12, ignore_eos=True)
    urgent = with_priority("urgent", [5, 6, 7], 0, seed=2, max_tokens=12, ignore_eos=True)
    simulation.scheduler.add(first)
    outputs = simulation.step()
    simulation.scheduler.add(urgent)
    outputs += finish(simulation)
    assert simulation.scheduler.stats.num_preemptions > 0
    ended = [output.request_id for output in outputs if output.finish_reason is not None]
    assert ended == ["urgent", "first"]
    for made in (first, urgent):
        assert tokens_of(outputs)[made.request_id, 0] == expected_tokens(made, 0, 20)
    simulation.scheduler.check_idle()


def test_random_priorities_change_no_token():
    rng = random.Random(8)
    for _ in range(20):
        simulation = make(num_blocks=8, max_model_len=24, max_num_seqs=rng.randrange(1, 6))
        requests = [
            with_priority(
                f"r{i}", [rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randrange(1, 12))], rng.randrange(-2, 3),
                seed=i, max_tokens=rng.randrange(1, 12), ignore_eos=True,
            )
            for i in range(12)
        ]  # fmt: skip
        for made in requests:
            simulation.scheduler.add(made)
        tokens = tokens_of(finish(simulation))
        assert tokens == {(made.request_id, 0): expected_tokens(made, 0, 24) for made in requests}
        simulation.scheduler.check_idle()


# ------------------------------------------------------------------------------------------------ salts, waiting, ends


def test_only_requests_of_one_salt_share_blocks():
    simulation, prompt = make(), list(range(2, 15))
    for name, salt, cached in [
        ("none", None, 0), ("none again", None, 12), ("a", "a", 0), ("b", "b", 0), ("a again", "a", 12),
    ]:  # fmt: skip
        made = request(name, prompt, max_tokens=2, ignore_eos=True)
        made.cache_salt = salt
        simulation.scheduler.add(made)
        assert {output.num_cached_tokens for output in finish(simulation)} == {cached}, name
    simulation.scheduler.check_idle()


def test_the_first_output_tells_how_long_its_choice_waited():
    now = [100.0]
    simulation = make(max_num_seqs=1, clock=lambda: now[0])
    for name in ("a", "b"):
        simulation.scheduler.add(request(name, [2], max_tokens=3, ignore_eos=True))
    outputs = []
    while simulation.scheduler.has_work:
        now[0] += 1.0
        outputs += simulation.step()
    told = {}
    for output in outputs:
        told.setdefault(output.request_id, []).append(output.queue_seconds)
    assert told == {"a": [1.0, None, None], "b": [4.0, None, None]}


def test_a_text_that_has_ended_without_an_end_token():
    simulation = make()
    simulation.scheduler.add(request("a", [2, 3], max_tokens=9, structured_outputs=StructuredOutputs(regex="a")))
    batch = simulation.scheduler.next()
    simulation.ranks.run(batch)
    (output,) = simulation.scheduler.update(StepResult(batch.step, [TEXT_ENDED], [None]))
    assert (output.finish_reason, output.stop_reason, output.token_ids) == (FinishReason.STOP, None, [])
    assert not simulation.scheduler.has_work
    simulation.scheduler.check_idle()


def test_a_grammar_that_fails_ends_its_request_and_leaves_the_cache():
    simulation, prompt = make(), [2, 3, 4, 5, 6]
    simulation.scheduler.add(request("bad", prompt, max_tokens=9))
    batch = simulation.scheduler.next()
    simulation.ranks.run(batch)
    failed = StepResult(batch.step, [NO_TOKEN], [None], errors={0: "structured_outputs.regex: unclosed group"})
    (output,) = simulation.scheduler.update(failed)
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, "structured_outputs.regex: unclosed group")
    simulation.scheduler.add(request("next", prompt, max_tokens=1))
    assert finish(simulation)[0].num_cached_tokens == 4, "the model's values were sound"
    simulation.scheduler.check_idle()


def test_an_end_token_ends_a_grammar_despite_ignore_eos():
    simulation = make()
    for name, structured in (("free", None), ("grammar", StructuredOutputs(regex="a*"))):
        made = request(name, [3], max_tokens=5, ignore_eos=True, structured_outputs=structured)
        made.eos_token_ids = list(range(VOCAB_SIZE))
        simulation.scheduler.add(made)
    ended = {o.request_id: o.finish_reason for o in finish(simulation) if o.finish_reason is not None}
    assert ended == {"free": FinishReason.LENGTH, "grammar": FinishReason.STOP}
