"""Batches that only decode, padded and copied into buffers that stay, give what they give op by op.

The graphs themselves need a GPU (tests/gpu); here a capture is the work itself, which replays by running again.
"""

import dataclasses
import gc
import weakref
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infer.cache import pages
from infer.cache.blocks import BlockPool
from infer.config import EngineConfig
from infer.engine.batch import NEW, PROMPT_LOGPROBS, SAMPLE, Batch, NewSequence
from infer.engine.graphs import bucket_sizes, is_decode_only, why_off
from infer.engine.inputs import PinnedRing, Shape, on_device, on_host, pad
from infer.engine.runner import Runner
from infer.engine.sampler import Sampler
from infer.engine.scheduler import Scheduler
from infer.models.config import ModelConfig, RopeConfig
from infer.models.decoder import Stage, balanced_layers
from infer.models.mla_config import MlaConfig
from infer.parallel.groups import alone
from infer.request import Request, SamplingParams
from infer.weights import init_dummy_weights

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN, MAX_NUM_SEQS = 4, 200, 64, 20
MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=211, hidden_size=48, num_layers=3, num_heads=6, num_kv_heads=2,
    head_dim=8, intermediate_size=50, norm_eps=1e-5, rope=RopeConfig(dim=8), max_position=MAX_MODEL_LEN,
    window=(0, 9, 0), tie_embeddings=True,
)  # fmt: skip


class Recorder:
    """A capture that notes what was captured and how often each was replayed."""

    def __init__(self, fails_at: int = 0):
        self.replays: list[int] = []  # of each capture
        self.resets: list[int] = []  # captures
        self._fails_at = fails_at  # the capture that finds no memory, counted from 1

    def __call__(self, work):
        index = len(self.replays)
        self.replays.append(0)
        if index + 1 == self._fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

        def replay():
            self.replays[index] += 1
            work()

        return SimpleNamespace(replay=replay, reset=lambda: self.resets.append(index))


class Links:
    """The pipes between stages in one process. What is sent is not copied until the next stage runs."""

    def __init__(self, num_stages):
        self._queues = [deque() for _ in range(num_stages)]

    def pipe(self, stage):
        def wait():
            return self._queues[stage].popleft()

        return SimpleNamespace(
            post_receive=lambda shape, dtype, step: wait,
            send=lambda tensor, step: self._queues[stage + 1].append(tensor),
        )


def make_runners(pp, capture, tp_size=1):
    links, runners = Links(pp), []
    for pp_rank, layers in enumerate(balanced_layers(MODEL, pp)):
        first, last = pp_rank == 0, pp_rank == pp - 1
        stage = Stage(MODEL, layers, alone(), is_first=first, is_last=last, dtype=torch.float32, device=CPU)
        init_dummy_weights(stage, 3)
        with torch.no_grad():
            for parameter in stage.parameters():  # so that one token leads clearly
                if parameter.dim() == 2:
                    parameter.mul_(8)
        stage.pack()
        memory = pages.allocate(NUM_BLOCKS, BLOCK_SIZE, stage.kv_layout, len(layers), torch.float32, CPU)
        groups = SimpleNamespace(
            topology=SimpleNamespace(pp_size=pp), is_first_stage=first, is_last_stage=last, is_sampler=last,
            pipe=links.pipe(pp_rank), tp=SimpleNamespace(size=tp_size),
        )  # fmt: skip
        sampler = Sampler(alone(), stage.vocab_starts) if last else None
        runner = Runner(stage, memory, groups, sampler, NUM_BLOCKS, BLOCK_SIZE, CPU)
        if capture is not None:
            runner.use_graphs(MAX_NUM_SEQS, MAX_MODEL_LEN, capture)
        runners.append(runner)
    return runners


def run_requests(requests, pp=1, capture=None, arrivals=None, tp_size=1):
    """request id -> [(token, its log-probability)]. arrivals: request id -> the step before which it comes.

    tp_size: what the graphs are told of it. All runners are closed at the end.
    """
    runners = make_runners(pp, capture, tp_size)
    scheduler = Scheduler(
        BlockPool(NUM_BLOCKS, BLOCK_SIZE), max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=64, pp_size=pp,
    )  # fmt: skip
    found, waiting, step = {request.request_id: [] for request in requests}, list(requests), 0
    in_flight = deque()
    while waiting or scheduler.has_work:
        for request in [r for r in waiting if (arrivals or {}).get(r.request_id, 0) <= step]:
            waiting.remove(request)
            scheduler.add(request)
        while (batch := scheduler.next()) is not None:  # the first stage is ahead by as many batches as may be
            for runner in runners:
                runner.receive(batch)
            runners[0].run(batch) if pp > 1 else None
            in_flight.append(batch)
        batch = in_flight.popleft()
        for runner in runners[1:] if pp > 1 else runners:
            result = runner.run(batch)
        for output in scheduler.update(result):
            entries = output.logprobs or [None] * len(output.token_ids)
            found[output.request_id] += [
                (token, entry and entry.logprobs[0]) for token, entry in zip(output.token_ids, entries, strict=True)
            ]
        step += 1
    scheduler.check_idle()
    for runner in runners:
        runner.close()
    return found


def make_requests(count, max_tokens=20, **params):
    rng = np.random.default_rng(count)
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=rng.integers(0, MODEL.vocab_size, 1 + (5 * i) % 17).tolist(),
            params=SamplingParams(
                temperature=(i % 2) * 0.7,
                max_tokens=max_tokens - i % 3,
                ignore_eos=True,
                logprobs=i % 3 or None,
                **params,
            ),
            seed=i,
        )
        for i in range(count)
    ]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tokens in expected.items():
        assert [token for token, _ in found[name]] == [token for token, _ in tokens], f"request {name}"
        for (_, a), (_, b) in zip(found[name], tokens, strict=True):
            assert (a is None) == (b is None) and (a is None or abs(a - b) < 1e-5), f"request {name}"


@pytest.mark.parametrize("pp", [1, 2, 3])
def test_graphs_give_the_same_tokens(pp):
    """13 requests that come and go: buckets larger than the batch, growing tables, prompts in between."""
    requests, arrivals = make_requests(13), {str(i): 2 * i for i in range(6, 13)}
    expected = run_requests(requests, pp, arrivals=arrivals)
    assert len({tuple(tokens) for tokens in expected.values()}) == 13
    capture = Recorder()
    assert_same(run_requests(requests, pp, capture, arrivals), expected)
    assert len(capture.replays) >= 3 * pp and sum(capture.replays) > 20 * pp
    assert sorted(capture.resets) == list(range(len(capture.replays))), "every graph ends once, with its runner"


def test_a_bucket_is_captured_on_its_second_use():
    capture = Recorder()
    run_requests(make_requests(1, max_tokens=6), capture=capture)
    # The prompt of one token is no different from a decode; of the 6 batches the first warms up.
    assert capture.replays == [5]
    capture = Recorder()
    run_requests(make_requests(1, max_tokens=1), capture=capture)
    assert capture.replays == []


def test_without_memory_for_a_capture_the_bucket_runs_op_by_op(caplog):
    requests = make_requests(5)
    capture = Recorder(fails_at=1)
    assert_same(run_requests(requests, capture=capture), run_requests(requests))
    assert capture.replays[0] == 0 and len(caplog.records) >= 1
    assert "no memory to capture the CUDA graph of" in caplog.text and "--gpu-memory-utilization" in caplog.text


def test_without_memory_for_a_capture_of_several_ranks_the_step_fails():
    """The others may have captured theirs: one rank must not go its own way."""
    with pytest.raises(RuntimeError, match=r"CUDA graph of 1 sequences: .*--enforce-eager needs none"):
        run_requests(make_requests(1), capture=Recorder(fails_at=1), tp_size=2)


@pytest.mark.parametrize("pp", [1, 2])
def test_the_stage_sees_the_same_kind_of_tensors_with_and_without_graphs(pp, monkeypatch):
    """torch.compile compiles again for others, and counts the tensors of inference mode as a kind of their own."""
    seen, forward = set(), Stage.forward

    def watched(stage, x, context):
        tensors = (x, context.positions, context.slots, context.block_table, context.query_start, context.seq_lens)
        seen.add(tuple(tensor.is_inference() for tensor in tensors))
        return forward(stage, x, context)

    monkeypatch.setattr(Stage, "forward", watched)
    for capture in (None, Recorder()):
        run_requests(make_requests(2, max_tokens=4), pp, capture)
        assert seen == {(True,) * 6}


def test_a_closed_runner_holds_neither_weights_nor_pages():
    """Though it lives on itself, as `Built` and what a user keeps of an engine let it."""
    capture = Recorder()
    (runner,) = make_runners(1, capture)
    held = [weakref.ref(x) for x in (runner.stage, runner.stage.norm.weight, runner.pages.k[0], runner.pages.v[-1])]
    runner.record()
    runner.use_graphs(MAX_NUM_SEQS, MAX_MODEL_LEN, capture)
    for step in range(3):
        first = int(step == 0)  # which brings the sequence and its block
        rows = np.array([[0, step, 1, SAMPLE | NEW * first, 1, first]], dtype=np.int32)
        token, blocks, freed = (np.zeros(length, dtype=np.int32) for length in (1, first, 0))
        new = [NewSequence(SamplingParams(temperature=0.0), 0, 0, 1, [])] * first
        runner.run(Batch(step, rows, token, blocks, freed, new))
    assert capture.replays == [2]
    gc.disable()  # nothing is to wait for it
    try:
        runner.close()
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()
    assert runner.busy_seconds > 0


def test_prompt_logprobs_go_op_by_op():
    requests = make_requests(4, prompt_logprobs=1)
    assert_same(run_requests(requests, capture=Recorder()), run_requests(requests))


def test_bucket_sizes():
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(3) == [1, 2, 3]
    assert bucket_sizes(8) == [1, 2, 4, 8]
    assert bucket_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert bucket_sizes(256)[-3:] == [240, 248, 256]


def batch_of(*rows):
    """rows: (start, count, flags)."""
    array = np.array([[i, start, count, flags, 0, 0] for i, (start, count, flags) in enumerate(rows)], dtype=np.int32)
    empty = np.zeros(0, dtype=np.int32)
    return Batch(0, array, empty, empty, empty)


def test_which_batches_only_decode():
    assert is_decode_only(batch_of((5, 1, SAMPLE), (0, 1, SAMPLE)))
    assert not is_decode_only(batch_of((5, 1, SAMPLE), (0, 2, SAMPLE)))
    assert not is_decode_only(batch_of((5, 1, SAMPLE), (0, 1, 0)))
    assert not is_decode_only(batch_of((5, 1, SAMPLE | PROMPT_LOGPROBS)))


def test_why_graphs_are_off(monkeypatch):
    def why(device="cuda", tp=1, local_ranks=1, gpus=1, has_kernels=True, config=MODEL, **flags):
        weight = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16)
        layers = [SimpleNamespace(attention=SimpleNamespace(num_q=6))]
        stage = SimpleNamespace(
            config=config, layers=layers, kv_layout=config.kv_layout(2), parameters=lambda: iter([weight]),
            modules=lambda: iter(()),
        )  # fmt: skip
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr("infer.native.decode_runs_on_device", lambda *shape: has_kernels)
        return why_off(EngineConfig(model="m", **flags), stage, tp, local_ranks)

    assert why() == "" and why(tp=2, local_ranks=2, gpus=2) == ""
    assert why(tp=1, local_ranks=2) == ""  # two stages on one GPU: no sum inside
    assert "share a GPU" in why(tp=2, local_ranks=2)
    assert why(enforce_eager=True) == "--enforce-eager"
    assert "no CUDA kernel" in why(has_kernels=False)
    assert "cpu" in why(device="cpu")
    mla = MlaConfig(
        q_lora_rank=0, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, softmax_scale=0.25
    )
    assert "latent attention has no CUDA kernel" in why(config=dataclasses.replace(MODEL, mla=mla))


# ------------------------------------------------------------------------------------------------------ the inputs


@pytest.mark.parametrize("shape", [Shape(1, 1, 1, 1), Shape(7, 3, 5, 2), Shape(8, 8, 2, 0), Shape(2, 1, 0, 0)])
def test_arrays_of_one_buffer_do_not_overlap(shape):
    buffer = torch.zeros(shape.num_bytes, dtype=torch.uint8)
    host, device = on_host(buffer.numpy(), shape), on_device(buffer, shape)
    names = ["tokens", "positions", "slots", "sampled", "query_start", "seq_lens", "block_table"]
    for number, name in enumerate(names, 1):
        getattr(host, name)[:] = number
    for number, name in enumerate(names, 1):
        array, tensor = getattr(host, name), getattr(device, name)
        assert array.shape == tuple(tensor.shape) and (array == number).all() and (tensor == number).all()
    assert sum(getattr(device, name).nbytes for name in names) == shape.num_bytes
    assert device.head.nbytes == shape.num_bytes - device.block_table.nbytes
    assert device.query_start.dtype == torch.int32 and device.slots.dtype == torch.int64


def test_padding_belongs_to_nobody():
    shape = Shape(4, 4, 2, 0)
    host = on_host(np.full(shape.num_bytes, 7, dtype=np.uint8), shape)
    pad(host, rows=3, seqs=3)
    assert host.slots[3] == -1 and host.tokens[3] == 0 and host.positions[3] == 0
    assert host.query_start[4] == 3 and host.seq_lens[3] == 0 and not host.block_table[3].any()
    assert host.slots[2] != -1 and host.query_start[3] != 3


class FakeEvent:
    """Notes in `log` what is done to it."""

    def __init__(self, number, log):
        self.number, self.log = number, log

    def record(self):
        self.log.append(("record", self.number))

    def synchronize(self):
        self.log.append(("wait", self.number))


def test_pinned_memory_is_reused_only_after_its_copy():
    log, sizes = [], []

    def allocate(size):
        sizes.append(size)
        return torch.zeros(size, dtype=torch.uint8)

    events = iter(range(2))
    ring = PinnedRing(2, allocate, lambda: FakeEvent(next(events), log))
    taken = []
    for size in (10, 10, 8, 15, 40):
        buffer = ring.take(size)
        assert len(buffer) == size
        taken.append(buffer.data_ptr())
        ring.copy_started()
    assert log == [(what, number) for number in (1, 0, 1, 0, 1) for what in ("wait", "record")]
    assert taken[0] == taken[2] and taken[1] == taken[3] and taken[0] != taken[1]
    assert sizes == [0, 0, 15, 15, 60]
