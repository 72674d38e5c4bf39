"""The sampler against a slow reference in float64, its draws against their distribution, and its indifference to the
batch and to how the vocabulary is split."""

import math
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from infer.engine import draw as draw_module
from infer.engine import sampler as sampler_module
from infer.engine.logit_edits import BadWords, TokenCounts
from infer.engine.sampler import Sampler, SampleResult, SampleRow
from infer.noise import counters, log_exponential, stream_key
from infer.ops import largest
from infer.parallel.groups import alone
from infer.request import SamplingParams, TokenLogprobs

MASK = (1 << 64) - 1
SPLITS = {1: [0, 211], 2: [0, 90, 211], 3: [0, 1, 150, 211]}
VOCAB = 211
EOS = [7]


class ThreadGroup:
    """A tensor-parallel group whose ranks are threads of this process. Counts what is gathered."""

    def __init__(self, index: int, shared: "Shared"):
        self.index, self.shared, self.size = index, shared, shared.size

    def gather(self, tensor: torch.Tensor, widths: list[int] | None = None) -> torch.Tensor | None:
        assert widths is None or widths[self.index] == tensor.shape[-1]
        self.shared.slots[self.index] = tensor
        self.shared.barrier.wait(timeout=20)
        slots = list(self.shared.slots)
        assert len({(len(slot), slot.dtype) for slot in slots}) == 1, "the ranks' collectives differ"
        self.shared.barrier.wait(timeout=20)
        if self.index:
            return None
        self.shared.gathered.append(sum(slot.numel() for slot in slots))
        return torch.cat(slots, -1)


class Shared:
    def __init__(self, size: int):
        self.size, self.slots, self.gathered = size, [None] * size, []
        self.barrier = threading.Barrier(size)


def run_split(starts: list[int], call) -> tuple[object, list[int]]:
    """call(sampler, columns) on every rank of a split; the first rank's result and the sizes of what was gathered."""
    size = len(starts) - 1
    shared, results, errors = Shared(size), [None] * size, []

    def rank(index: int) -> None:
        try:
            columns = slice(starts[index], starts[index + 1])
            results[index] = call(Sampler(ThreadGroup(index, shared), starts), columns)
        except BaseException as error:
            errors.append(error)
            shared.barrier.abort()

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert all(result is None for result in results[1:])
    return results[0], shared.gathered


def fresh(row: SampleRow) -> SampleRow:
    """A copy without what the row remembers (each rank has its own)."""
    return replace(row)


def sample(logits: torch.Tensor, rows: list[SampleRow], starts: list[int] | None = None) -> SampleResult:
    if starts is None or len(starts) == 2:
        result = Sampler(alone(), [0, logits.shape[-1]]).sample(logits, [fresh(row) for row in rows])
    else:
        result, _ = run_split(starts, lambda s, at: s.sample(logits[:, at].contiguous(), [fresh(r) for r in rows]))
    assert isinstance(result, SampleResult)
    return result


def make_row(params: SamplingParams, *, seed=0, choice=0, position=9, prompt=(1, 2, 3), output=()) -> SampleRow:
    return SampleRow(
        params, seed, choice, position, np.array(prompt, np.int32), np.array(output, np.int32), eos_token_ids=EOS
    )


# ---------------------------------------------------------------- the reference: plain loops, one row, float64


def reference_mix(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & MASK
    return word ^ word >> 31


def reference_gumbel(row: SampleRow, token: int) -> float:
    gamma, state = 0x9E3779B97F4A7C15, 0
    for word in (row.seed, row.choice, row.position):
        state = reference_mix(((state ^ (word & MASK)) + gamma) & MASK)
    bits = reference_mix((state + (token + 1) * gamma) & MASK)
    return -math.log(-math.log1p(-((bits & (2**53 - 1)) + 0.5) / 2**53))


def reference_edits(logits: list[float], row: SampleRow) -> list[float]:
    p, x, output = row.params, list(logits), row.output_token_ids.tolist()
    if row.grammar_mask is not None:
        bits = "".join(f"{int(word) & 0xFFFFFFFF:032b}"[::-1] for word in row.grammar_mask)
        x = [v if bits[i] == "1" else -math.inf for i, v in enumerate(x)]
    if p.allowed_token_ids:
        x = [v if i in p.allowed_token_ids else -math.inf for i, v in enumerate(x)]
    for word in bad_words_of(row):
        if output[len(output) - len(word) + 1 :] == word[:-1]:
            x[word[-1]] = -math.inf
    if len(output) < p.min_tokens and not row.grammar_ended:
        for token in [*row.eos_token_ids, *(p.stop_token_ids or [])]:
            x[token] = -math.inf
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    counts = Counter(output)
    for token in set(row.prompt_token_ids.tolist()) | set(counts):
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token, count in counts.items():
        x[token] -= p.frequency_penalty * count + p.presence_penalty
    return x


def bad_words_of(row: SampleRow) -> list[list[int]]:
    """What its BadWords was made from."""
    if row.bad_words is None:
        return []
    longer = [word for words in row.bad_words._longer.values() for word in words]
    return [[token] for token in row.bad_words.single] + longer


def reference_candidates(x: list[float], p: SamplingParams) -> list[int]:
    """Token ids that truncation leaves, by (logit falling, id rising)."""
    order = sorted((i for i, v in enumerate(x) if v > -math.inf), key=lambda i: (-x[i], i))
    weight = {i: math.exp((x[i] - x[order[0]]) / p.temperature) for i in order}
    order = [i for i in order if weight[i] >= p.min_p]
    if p.top_k > 0:
        order = order[: p.top_k]
    if p.top_p < 1:
        total, reached, kept = math.fsum(weight[i] for i in order), 0.0, []
        for i in order:
            if kept and reached >= p.top_p * total:
                break
            kept.append(i)
            reached += weight[i]
        order = kept
    return order


def reference_token(logits: torch.Tensor, row: SampleRow) -> int:
    x, p = reference_edits(logits.double().tolist(), row), row.params
    if p.greedy:
        return x.index(max(x))
    return max(reference_candidates(x, p), key=lambda i: x[i] / p.temperature + reference_gumbel(row, i))


def check_logprobs(entry: TokenLogprobs, logits: torch.Tensor, token: int, k: int) -> None:
    expected = torch.log_softmax(logits.double(), -1).tolist()
    order = sorted(range(len(expected)), key=lambda i: (-expected[i], i))
    assert entry.tokens == [token, *order[:k]]
    assert entry.ranks == [order.index(token) + 1, *range(1, min(k, len(order)) + 1)]
    assert entry.logprobs == pytest.approx([expected[i] for i in entry.tokens], abs=1e-5)


# ---------------------------------------------------------------- parameters

PARAMETERS = {
    "greedy": {"temperature": 0.0},
    "random": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 5.0},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k over the vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.7},
    "top_p 0.999": {"top_p": 0.999},
    "tiny top_p": {"top_p": 1e-9},
    "min_p": {"min_p": 0.1},
    "min_p 1": {"min_p": 1.0},
    "all truncations": {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    "top_p of min_p": {"top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
    "top_p of top_k, whole rows": {"top_p": 0.3, "top_k": 60, "temperature": 4.0, "logprobs": 1},
    "top_p, hot": {"top_p": 0.95, "temperature": 4.0},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.2, "temperature": 0.0},
    "negative frequency": {"frequency_penalty": -2.0},
    "repetition": {"repetition_penalty": 1.7, "temperature": 0.0},
    "repetition under 1": {"repetition_penalty": 0.6},
    "all penalties": {"presence_penalty": -0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "top_p": 0.9},
    "bias": {"logit_bias": {3: 4.0, 205: 5.0, 7: -100.0}},
    "allowed": {"allowed_token_ids": [0, 5, 149, 150, 210, 5]},
    "allowed, greedy": {"allowed_token_ids": [2, 149, 210], "temperature": 0.0},
    "allowed, top_k": {"allowed_token_ids": [2, 149, 210], "top_k": 8},
    "allowed, top_p": {"allowed_token_ids": [2, 149, 210], "top_p": 0.6},
    "min_tokens": {"min_tokens": 12, "max_tokens": 20, "stop_token_ids": [4, 200], "top_k": 3},
    "min_tokens, ignore_eos": {"min_tokens": 12, "max_tokens": 20, "ignore_eos": True, "temperature": 0.0},
    "logprobs": {"logprobs": 3},
    "logprobs 0, greedy": {"logprobs": 0, "temperature": 0.0},
    "logprobs over the vocabulary": {"logprobs": 500, "top_k": 4},
    "logprobs with edits": {"logprobs": 5, "top_p": 0.9, "repetition_penalty": 1.4, "logit_bias": {9: 3.0}},
}


def random_case(params: SamplingParams, generator: np.random.Generator) -> SampleRow:
    length = int(generator.integers(0, 12))
    return make_row(
        params,
        seed=int(generator.integers(-(2**63), 2**63 - 1)),
        choice=int(generator.integers(0, 4)),
        position=20 + length,
        prompt=generator.integers(0, VOCAB, 20),
        output=generator.integers(0, 40, length),
    )


def random_logits(num_rows: int, generator: np.random.Generator, dtype=torch.float32) -> torch.Tensor:
    scale = generator.choice([0.5, 2.0, 6.0], size=(num_rows, 1))
    logits = generator.standard_normal((num_rows, VOCAB)) * scale
    logits[:, EOS[0]] += 3 * scale[:, 0]  # so that min_tokens matters
    return torch.from_numpy(logits).to(dtype)


@pytest.fixture(params=[(256, 4096), (4, 32)], ids=["one prefix", "several prefixes"])
def prefixes(request, monkeypatch) -> None:
    monkeypatch.setattr(draw_module, "PREFIXES", request.param)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_equals_the_reference(name, prefixes):
    generator = np.random.default_rng(list(PARAMETERS).index(name))
    params = SamplingParams(**PARAMETERS[name])
    rows = [random_case(params, generator) for _ in range(12)]
    logits = random_logits(len(rows), generator)
    before = logits.clone()
    for starts in SPLITS.values():
        result = sample(logits, rows, starts)
        assert result.token_ids == [reference_token(x, row) for x, row in zip(logits, rows, strict=True)]
        for x, token, entry in zip(logits, result.token_ids, result.logprobs, strict=True):
            if params.logprobs is None:
                assert entry is None
            else:
                check_logprobs(entry, x, token, params.logprobs)
    assert torch.equal(logits, before), "the sampler changed its input"


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {}, {"top_k": 6}, {"top_p": 0.8}, {"logprobs": 2}, {"min_tokens": 12, "max_tokens": 20}],
    ids=str,
)
def test_grammars_and_bad_words_equal_the_reference(options):
    generator = np.random.default_rng(7)
    rows = [random_case(SamplingParams(**options), generator) for _ in range(24)]
    logits = random_logits(len(rows), generator)
    for i, row in enumerate(rows):
        if i % 3 != 0:  # a word that ends the sign bit too; bits beyond the vocabulary mean nothing
            row.grammar_mask = generator.integers(-(2**31), 2**31, -(-VOCAB // 32), dtype=np.int32)
            row.grammar_mask[0] |= 1 << EOS[0]
            row.grammar_ended = i % 2 == 0
        if i % 4 == 0:
            best = int(logits[i].argmax())
            last = row.output_token_ids.tolist()[-2:]
            row.bad_words = BadWords([[best], [*last, 9], [3, 4, 5], [205], [9, 9]])
    for starts in SPLITS.values():
        result = sample(logits, rows, starts)
        assert result.token_ids == [reference_token(x, row) for x, row in zip(logits, rows, strict=True)]


def test_bad_words_are_completed_by_no_token():
    words = BadWords([[5], [1, 2], [7, 1, 3], [1, 1, 4], [8, 9], [5]])
    for output, forbidden in [
        ([], {5}), ([1], {5, 2}), ([7, 1], {5, 2, 3}), ([1, 1], {5, 2, 4}), ([1, 7], {5}), ([8], {5, 9}),
        ([1, 7, 1], {5, 2, 3}),
    ]:  # fmt: skip
        assert words.forbidden(np.array(output, np.int32)) == forbidden, output


def test_a_grammar_that_leaves_nothing_gives_no_token():
    rows = [make_row(SamplingParams()), make_row(SamplingParams(top_p=0.5)), make_row(SamplingParams(top_k=3))]
    for row in rows:
        row.grammar_mask = np.zeros(-(-VOCAB // 32), np.int32)
    for starts in SPLITS.values():
        assert sample(random_logits(3, np.random.default_rng(1)), rows, starts).token_ids == [-1, -1, -1]


def random_mix(num_rows: int, generator: np.random.Generator) -> list[SampleRow]:
    """Rows that each combine a few entries of PARAMETERS."""
    rows = []
    for _ in range(num_rows):
        names = generator.choice(list(PARAMETERS), size=int(generator.integers(1, 4)), replace=False)
        rows.append(random_case(SamplingParams(**{k: v for n in names for k, v in PARAMETERS[n].items()}), generator))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_batches_alone_and_split_equal_the_reference(dtype, prefixes):
    """Half-precision logits are full of ties, so this also holds the order of equals to (value, lowest id)."""
    generator = np.random.default_rng(5)
    rows = random_mix(80, generator)
    logits = random_logits(len(rows), generator, dtype)
    expected = [reference_token(x, row) for x, row in zip(logits, rows, strict=True)]
    results = {size: sample(logits, rows, starts) for size, starts in SPLITS.items()}
    for result in results.values():
        assert result.token_ids == expected
        assert result.logprobs == results[1].logprobs
    backwards = sample(logits.flip(0), rows[::-1])
    assert backwards.token_ids[::-1] == expected and backwards.logprobs[::-1] == results[1].logprobs
    for i, row in enumerate(rows):
        one = sample(logits[i : i + 1], [row])
        assert one.token_ids == expected[i : i + 1] and one.logprobs == results[1].logprobs[i : i + 1]


def test_a_wide_vocabulary_passes_every_prefix():
    """Flat rows need a full sort, middling ones the second prefix, peaked ones the first."""
    generator = np.random.default_rng(1)
    scales = np.array([0.1, 1.0, 2.0, 4.0, 8.0, 16.0])[:, None]
    logits = torch.from_numpy(generator.standard_normal((6, 6000)) * scales).float()
    rows = [make_row(SamplingParams(top_p=p), seed=i) for i in range(6) for p in (0.5, 0.9)]
    logits = logits.repeat_interleave(2, 0)
    expected = [reference_token(x, row) for x, row in zip(logits, rows, strict=True)]
    assert sample(logits, rows).token_ids == expected
    assert sample(logits, rows, [0, 100, 3003, 6000]).token_ids == expected


@pytest.mark.parametrize("options", [{"min_p": 0.5}, {"top_k": 40, "logprobs": 0}, {"top_k": 40}], ids=str)
def test_top_p_is_a_share_of_what_the_others_leave(options, monkeypatch):
    """40 of 100 tokens are left, of which top_p 0.4 is the first 16; of all it would be 23, in the prefix too."""
    monkeypatch.setattr(draw_module, "PREFIXES", (32,))
    logits = torch.zeros(200, 100)
    logits[:, 40:] = math.log(0.3)
    rows = [make_row(SamplingParams(top_p=0.4 - 1e-9, **options), seed=i) for i in range(200)]
    assert set(sample(logits, rows).token_ids) == set(range(16))


# ---------------------------------------------------------------- noise and its distribution


def uniform_bits(state: int, ids: torch.Tensor) -> torch.Tensor:
    """The noise of some token ids, turned back into the uniforms it is made from."""
    states = counters(ids) + state
    noise = log_exponential(states, torch.empty_like(states), torch.empty(ids.shape, dtype=torch.float32))
    return -torch.expm1(-noise.double().exp())


def test_the_bits_are_splitmix64s():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]  # the first outputs for seed 1234567
    uniforms = uniform_bits(1234567, torch.arange(5))
    expected = [(word & (2**53 - 1)) / 2**53 for word in published]
    assert uniforms.tolist() == pytest.approx(expected, rel=1e-5)


def test_noise_is_finite_at_both_ends_of_the_uniform():
    """States that SplitMix64 maps to all zeros and all ones: u may become neither 0 nor 1."""
    states = torch.tensor([0, _unmix(MASK)], dtype=torch.int64)
    noise = log_exponential(states, torch.empty_like(states), torch.empty(2))
    assert noise.isfinite().all()
    assert noise[0] < -36 and noise[1] > 2.8


def _unmix(word: int) -> int:
    """The signed state that SplitMix64's finalizer maps to `word`."""

    def unshift(value: int, shift: int) -> int:
        result = value
        for _ in range(64 // shift + 1):
            result = value ^ result >> shift
        return result

    word = unshift(word, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    word = unshift(word, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    word = unshift(word, 30)
    assert reference_mix(word) == MASK
    return word - (1 << 64) if word >> 63 else word


LOGITS = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -2.0, 0.25]])


def draws(rows: list[SampleRow], logits: torch.Tensor = LOGITS) -> np.ndarray:
    return np.array(sample(logits.expand(len(rows), -1), rows).token_ids)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 8, "top_p": 0.99999}, {"min_p": 1e-6}, {"temperature": 2.5}], ids=str
)
def test_draws_have_the_softmax_distribution(options):
    params = SamplingParams(**options)
    tokens = draws([make_row(params, position=i) for i in range(12_000)])
    expected = torch.softmax(LOGITS[0].double() / params.temperature, -1).numpy() * len(tokens)
    assert chi_square(np.bincount(tokens, minlength=8), expected) < 29.9  # 7 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("field", ["position", "seed", "choice"])
def test_neighbouring_draws_are_independent(field):
    tokens = draws([make_row(SamplingParams(), **{field: i}) for i in range(12_000)])
    probabilities = torch.softmax(LOGITS[0].double(), -1).numpy()
    for distance in (1, 2, 64):
        pairs = np.bincount(tokens[:-distance] * 8 + tokens[distance:], minlength=64)
        expected = np.outer(probabilities, probabilities).ravel() * (len(tokens) - distance)
        assert chi_square(pairs, expected) < 113  # 63 degrees of freedom, p = 1e-4


def test_noise_is_uniform_over_a_real_vocabulary():
    """One draw's noise over many token ids, in 256 bins, and uncorrelated with the next position's."""
    ids = torch.arange(1 << 17)
    first, second = (uniform_bits(stream_key(3, 0, at), ids) for at in (10, 11))
    counts = torch.histc(first.float(), bins=256, min=0, max=1).numpy()
    assert chi_square(counts, np.full(256, len(ids) / 256)) < 347  # 255 degrees of freedom, p = 1e-4
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4 / math.sqrt(len(ids))


def test_seeds_at_the_ends_of_their_range_differ():
    seeds = [-(2**63), -(2**63) + 1, -(2**32), -1, 0, 1, 2**32, 2**63 - 1]
    words = [(seed, choice, position) for seed in seeds for choice in (0, 1) for position in (0, 1, 2**20)]
    keys = {stream_key(*word) for word in words}
    assert len(keys) == len(words) and all(-(2**63) <= key < 2**63 for key in keys)
    logits = torch.zeros(len(seeds), 50_000)
    assert len(set(draws([make_row(SamplingParams(), seed=seed) for seed in seeds], logits))) == len(seeds)


def test_a_draw_repeats_and_changes_with_each_of_seed_choice_and_position():
    logits = torch.zeros(1, 50_000)
    base = draws([make_row(SamplingParams())], logits)
    assert draws([make_row(SamplingParams())], logits) == base
    for changed in ({"seed": 1}, {"choice": 1}, {"position": 10}):
        assert draws([make_row(SamplingParams(), **changed)], logits) != base


# ---------------------------------------------------------------- ties


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_largest_takes_the_lowest_columns_of_equals(dtype):
    generator = np.random.default_rng(2)
    logits = torch.from_numpy(generator.integers(-3, 4, (40, 97)).astype(np.float32)).to(dtype)
    logits[5] = 0
    logits[6, 2:] = -math.inf
    for k in (1, 2, 13, 96, 97, 200):
        values, columns = largest(logits, k)
        for row, got_values, got in zip(logits.float().tolist(), values.tolist(), columns.tolist(), strict=True):
            assert got == sorted(range(97), key=lambda i: (-row[i], i))[:k]
            assert got_values == [row[i] for i in got]


@pytest.mark.parametrize("starts", SPLITS.values(), ids=str)
def test_ties_go_to_the_lowest_id(starts):
    logits = torch.zeros(6, VOCAB)
    logits[1, [140, 160, 200]] = 1.0
    rows = [make_row(SamplingParams(temperature=0)) for _ in range(2)]
    rows += [make_row(SamplingParams(top_k=k, temperature=100.0), seed=k) for k in (2, 3)]  # 0 .. k-1 are left
    rows += [make_row(SamplingParams(top_p=p, temperature=100.0), seed=9) for p in (10 / VOCAB, 1 / VOCAB)]
    tokens = sample(logits, rows, starts).token_ids
    assert tokens == [reference_token(x, row) for x, row in zip(logits, rows, strict=True)]
    assert tokens[:2] == [0, 140] and tokens[2] < 2 and tokens[3] < 3 and tokens[4] < 10 and tokens[5] == 0


# ---------------------------------------------------------------- broken rows, extremes

EVERY_PATH = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {},
    {"top_k": 4},
    {"top_p": 0.5},
    {"min_p": 0.1},
    {"logprobs": 2},
    {"logprobs": 2, "top_p": 0.5},
    {"allowed_token_ids": [10, 20, 200]},
    {"allowed_token_ids": [10, 20, 200], "top_k": 2},
    {"allowed_token_ids": [10, 20, 200], "top_p": 0.5},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("starts", SPLITS.values(), ids=str)
def test_broken_rows_give_no_token_and_leave_the_others_alone(starts, dtype):
    generator = np.random.default_rng(0)
    clean = random_logits(5, generator, dtype)
    for options in EVERY_PATH:
        rows = [make_row(SamplingParams(**options), seed=i) for i in range(5)]
        logits = clean.clone()
        logits[0, 180] = math.nan
        logits[1, 180] = math.inf
        logits[2] = -math.inf
        logits[3, :100] = -math.inf  # sound: padding
        expected = [reference_token(x, row) for x, row in zip(logits[3:], rows[3:], strict=True)]
        result = sample(logits, rows, starts)
        assert result.token_ids == [-1, -1, -1, *expected], options
        assert result.logprobs[:3] == [None] * 3
        assert (result.logprobs[4] is not None) == ("logprobs" in options)


def test_a_row_without_any_token_left_gives_none():
    params = SamplingParams(allowed_token_ids=EOS, min_tokens=2)
    for extra in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}, {"logprobs": 1}):
        fields = {"allowed_token_ids": params.allowed_token_ids, "min_tokens": 2, **extra}
        row = make_row(SamplingParams(**fields), output=[1])
        assert sample(torch.zeros(1, VOCAB), [row]).token_ids == [-1]
        assert (
            sample(torch.zeros(1, VOCAB), [replace(row, output_token_ids=np.array([1, 2], np.int32))]).token_ids == EOS
        )


@pytest.mark.parametrize("temperature", [0.0, 1.1e-5, 1.0, 100.0])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.2, "logprobs": 1}], ids=str)
def test_extreme_penalties_still_draw_a_token(temperature, truncation):
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 30
    for repetition in (1e-300, 1e-38, 1e-3, 100.0):
        params = SamplingParams(
            temperature=temperature,
            repetition_penalty=repetition,
            frequency_penalty=2.0,
            presence_penalty=-2.0,
            logit_bias={5: 100.0, 6: -100.0},
            **truncation,
        )
        row = make_row(params, prompt=range(100), output=[5] * 3000 + [150])
        tokens = [sample(logits, [row], starts).token_ids[0] for starts in SPLITS.values()]
        assert 0 <= tokens[0] < VOCAB and len(set(tokens)) == 1


def test_a_cold_draw_is_the_greedy_one():
    logits = random_logits(50, np.random.default_rng(3))
    cold = sample(logits, [make_row(SamplingParams(temperature=1.1e-5), seed=i) for i in range(50)])
    assert cold.token_ids == logits.argmax(-1).tolist()


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    ("options", "elements"),
    [({"temperature": 0.0}, 4), ({}, 4), ({"top_k": 5, "top_p": 0.5}, 20), ({"top_p": 0.5}, VOCAB)],
    ids=str,
)
def test_only_candidates_travel_where_they_are_enough(options, elements):
    logits, rows = torch.randn(8, VOCAB), [make_row(SamplingParams(**options), seed=i) for i in range(8)]
    _, gathered = run_split(SPLITS[2], lambda s, at: s.sample(logits[:, at], [fresh(row) for row in rows]))
    assert gathered == [8 * elements]


def test_whole_rows_are_gathered_in_parts(monkeypatch):
    generator = np.random.default_rng(8)
    rows = [make_row(SamplingParams(logprobs=2, top_p=0.8), seed=i) for i in range(10)]
    logits = random_logits(10, generator)
    whole = sample(logits, rows)
    monkeypatch.setattr(sampler_module, "MAX_ELEMENTS_AT_ONCE", 3 * VOCAB)
    assert sample(logits, rows) == whole
    result, gathered = run_split(SPLITS[3], lambda s, at: s.sample(logits[:, at], [fresh(row) for row in rows]))
    assert result == whole and gathered == [3 * VOCAB] * 3 + [VOCAB]


# ---------------------------------------------------------------- prompt log-probabilities, counts, wrong calls


@pytest.mark.parametrize("starts", SPLITS.values(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompt_logprobs(starts, dtype):
    generator = np.random.default_rng(4)
    logits = random_logits(12, generator, dtype)
    targets = generator.integers(0, VOCAB, 12).tolist()
    k = [0, 1, 2, 5, 0, 300, 1, 1, 7, 0, 0, 3]
    if len(starts) == 2:
        entries = Sampler(alone(), starts).prompt_logprobs(logits, targets, k)
    else:
        entries, _ = run_split(starts, lambda s, at: s.prompt_logprobs(logits[:, at], targets, k))
    assert len(entries) == 12
    for entry, x, target, wanted in zip(entries, logits, targets, k, strict=True):
        check_logprobs(entry, x, target, wanted)


def test_counts_follow_the_output_as_a_recount_would():
    generator = np.random.default_rng(6)
    prompt, output = generator.integers(0, 50, 30).astype(np.int32), generator.integers(0, 60, 200).astype(np.int32)
    counts, length = TokenCounts(prompt), 0
    while length < len(output):
        length = min(len(output), length + int(generator.integers(0, 9)))
        counts.follow(output[:length])
        expected = Counter(output[:length].tolist())
        ids = sorted(set(prompt.tolist()) | set(expected))
        assert counts.ids.tolist() == ids
        assert counts.generated.tolist() == [expected[i] for i in ids]


def test_a_kept_row_draws_as_a_new_one_does():
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, temperature=0.0)
    sampler, kept, output = Sampler(alone(), [0, VOCAB]), make_row(params), []
    logits = random_logits(1, np.random.default_rng(9))
    for step in range(30):
        kept.position, kept.output_token_ids = 3 + step, np.array(output, np.int32)
        token = sampler.sample(logits, [kept]).token_ids[0]
        assert token == reference_token(logits[0], make_row(params, position=3 + step, output=output))
        output.append(token)
    assert len(set(output)) > 5


def test_no_rows_draw_nothing():
    sampler = Sampler(alone(), [0, VOCAB])
    assert sampler.sample(torch.empty(0, VOCAB), []) == SampleResult([], [])
    assert sampler.prompt_logprobs(torch.empty(0, VOCAB), [], []) == []


@pytest.mark.parametrize("starts", [[0], [0, 5, 9], [1, 5], [0, 0]], ids=str)
def test_starts_that_do_not_fit_the_group_are_refused(starts):
    with pytest.raises(ValueError, match="vocab_starts must be 2 rising integers from 0"):
        Sampler(alone(), starts)


def test_logits_of_the_wrong_shape_are_refused():
    with pytest.raises(AssertionError, match=r"logits are \(1, 10\), not \[1, 211\]"):
        Sampler(alone(), [0, VOCAB]).sample(torch.zeros(1, 10), [make_row(SamplingParams())])
