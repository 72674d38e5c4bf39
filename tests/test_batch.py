"""The messages between ranks: what goes in comes out, and nothing malformed does."""

import random

import msgspec
import numpy as np
import pytest

from infer.engine.batch import (
    COLUMNS,
    COUNT,
    Batch,
    Kind,
    NewSequence,
    StepResult,
    check_step,
    decode,
    decode_result,
    encode_batch,
    encode_control,
    encode_result,
)
from infer.request import SamplingParams, StructuredOutputs, TokenLogprobs


def ints(*values):
    return np.array(values, dtype=np.int32)


def make_batch(num_rows=3, new=()):
    rows = np.arange(num_rows * COLUMNS, dtype=np.int32).reshape(-1, COLUMNS)
    return Batch(7, rows, ints(5, 6, 7, 8), ints(1, 2), ints(40, 41, 42), list(new), report=True)


PARAMS = SamplingParams(
    n=3, temperature=0.7, top_p=0.9, top_k=4, min_p=0.1, seed=-(2**63), presence_penalty=0.5, frequency_penalty=-0.5,
    repetition_penalty=1.5, stop=["x", "yy"], stop_token_ids=[3, 4], include_stop_str_in_output=True, ignore_eos=True,
    max_tokens=None, min_tokens=2, logprobs=5, prompt_logprobs=0, detokenize=True, skip_special_tokens=False,
    logit_bias={7: -3.5, 900000: 100.0}, allowed_token_ids=[7, 8], spaces_between_special_tokens=False,
    bad_words=["b"], structured_outputs=StructuredOutputs(json={"b": 1, "a": 2}, whitespace_pattern=" "),
)  # fmt: skip


def same(batch, other):
    assert (batch.step, batch.report, batch.new) == (other.step, other.report, other.new)
    for name in ("rows", "tokens", "blocks", "freed"):
        ours, theirs = getattr(batch, name), getattr(other, name)
        assert ours.dtype == theirs.dtype == np.int32 and ours.shape == theirs.shape and (ours == theirs).all(), name


def test_a_batch_comes_out_as_it_went_in():
    new = [
        NewSequence(PARAMS, 2**63 - 1, 2, 17, [1, 2], [[3], [4, 5]]),
        NewSequence(SamplingParams(), -(2**63), 0, 1, []),
    ]
    for batch in (
        make_batch(),
        make_batch(new=new),
        Batch(1, np.zeros((0, COLUMNS), np.int32), ints(), ints(), ints()),
    ):
        words = encode_batch(batch, generation=4)
        assert words.dtype == np.int32
        kind, decoded = decode(words, generation=4)
        assert kind == Kind.STEP
        same(batch, decoded)
    assert make_batch().num_tokens == 2 + 8 + 14


def test_every_sampling_parameter_travels():
    defaults = SamplingParams()
    for name in SamplingParams.__struct_fields__:
        assert getattr(PARAMS, name) != getattr(defaults, name) or name == "detokenize", f"{name} is not tried here"
    _, batch = decode(encode_batch(make_batch(new=[NewSequence(PARAMS, 0, 0, 1, [])]), 0), 0)
    assert batch.new[0].params == PARAMS


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 + 5, 2**63 - 1, -(2**63)])
def test_seeds_of_64_bits(seed):
    _, batch = decode(encode_batch(make_batch(new=[NewSequence(SamplingParams(), seed, 0, 1, [])]), 0), 0)
    assert batch.new[0].seed == seed


@pytest.mark.parametrize("payload", [None, {"config": {"model": "a", "pipeline_layer_partition": [1, 2]}, "x": None}])
def test_control_messages(payload):
    for kind in (Kind.IDLE, Kind.BUILD, Kind.CLOSE, Kind.EXIT):
        assert decode(encode_control(kind, 3, payload), 3) == (kind, payload)


def make_result():
    entries = [TokenLogprobs([4, 5], [-0.5, -1.5], [1, 2]), TokenLogprobs([6], [float("-inf")], [9])]
    return StepResult(9, [4, -1, 6], [entries[0], None, entries[1]], {3: entries, 70000: []}, {1: "because"})


def test_a_result_comes_out_as_it_went_in():
    assert decode_result(encode_result(make_result(), 2), 2) == make_result()
    plain = StepResult(1, [5, 6], [None, None])
    assert decode_result(encode_result(plain, 2), 2) == plain
    failed = StepResult(1, [-1, -2], [None, None], errors={0: "because"})
    assert decode_result(encode_result(failed, 2), 2) == failed
    empty = StepResult(1, [], [])
    assert decode_result(encode_result(empty, 2), 2) == empty


def test_a_result_of_prompt_chunks_alone():
    result = StepResult(1, [], [], {5: [TokenLogprobs([1], [-0.25], [1])]})
    assert decode_result(encode_result(result, 0), 0) == result


def test_another_generation_is_refused():
    with pytest.raises(ValueError, match="generation 4 reached generation 5"):
        decode(encode_batch(make_batch(), 4), 5)
    with pytest.raises(ValueError, match="generation 4"):
        decode_result(encode_result(make_result(), 4), 5)


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (decode, encode_batch(make_batch(new=[NewSequence(PARAMS, 2**40, 1, 5, [1])]), 6)),
        (decode, encode_control(Kind.BUILD, 6, {"config": {"model": "somewhere"}})),
        (decode_result, encode_result(make_result(), 6)),
    ],
    ids=["batch", "control", "result"],
)
def test_malformed_messages_are_refused(decoder, words):
    """Whatever is cut or changed: a ValueError, or a message all the same, but nothing else."""
    rng = random.Random(1)
    for length in range(len(words)):
        with pytest.raises(ValueError):
            decoder(words[:length], 6)
    for _ in range(3000):
        broken = words.copy()
        for _ in range(rng.randrange(1, 4)):
            value = rng.choice([0, -1, 1, 2**31 - 1, -(2**31), rng.randrange(-(2**31), 2**31), rng.randrange(64)])
            broken[rng.randrange(len(broken))] = value
        if rng.random() < 0.3:
            broken = broken[: rng.randrange(len(broken) + 1)]
        try:
            decoder(broken, 6)
        except ValueError as error:
            assert str(error)
    for _ in range(300):
        with pytest.raises(ValueError):
            decoder(np.frombuffer(rng.randbytes(4 * rng.randrange(60)), dtype=np.int32), 6)


def test_parameters_are_checked_again_on_arrival():
    """The receiver builds SamplingParams from the bytes: what the constructor refuses cannot come in by wire."""
    words = encode_batch(make_batch(new=[NewSequence(SamplingParams(top_k=5), 1, 0, 1, [])]), 0)
    raw = bytearray(words.tobytes())
    at = raw.index(b"top_k") + len(b"top_k")
    assert raw[at] == 5
    raw[at] = 0xE0  # MessagePack's -32
    with pytest.raises((ValueError, msgspec.ValidationError), match="top_k"):
        decode(np.frombuffer(bytes(raw), dtype=np.int32), 0)


def test_steps_come_one_after_the_other():
    batch = make_batch()
    assert check_step(batch, batch.step - 1) == batch.step
    batch.step = 0
    assert check_step(batch, 2**31 - 1) == 0, "int32"
    with pytest.raises(ValueError, match="step 0 came where step 6 was due"):
        check_step(batch, 5)
    batch.rows[0, COUNT] = -4
    with pytest.raises(ValueError, match="step 0 holds"):
        check_step(batch, 2**31 - 1)
    batch.rows = batch.rows[:0]
    with pytest.raises(ValueError, match="step 0 holds 0 rows"):
        check_step(batch, 2**31 - 1)
