"""The arithmetic of drawing a token: counter-based noise, the largest logits in a total order, truncation.

Every function here works row by row, and a row's result is a function of that row alone:

- Largest logits are ordered by (value falling, token id rising), a total order, so "the k largest" is one set however
  the kernels break ties, and whatever larger k a neighbour asks for.
- Sums over a row are accumulated in float64. Kernels may add in another order when the number of rows or threads
  changes; in float64 that moves a sum by about 1e-16 of itself, nine orders of magnitude under the resolution of the
  float32 logits it is compared with.

Noise. A token is drawn with the Gumbel-max trick: argmax of logit + temperature * g, where g = -log(-log(u)) are
independent standard Gumbel variables, has the softmax distribution of logit / temperature (Gumbel 1954; Maddison,
Tarlow and Minka, "A* sampling", 2014). Against an inverse CDF it has two merits: each vocabulary shard perturbs its own
part, and the decision has wide margins, so that the 1e-5 by which logits differ between layouts hardly ever changes a
token, where a CDF over 50,000 entries moves at every one of them.

The uniform u of vocabulary id v is the v-th output of a SplitMix64 generator (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014) whose state is a hash of (seed, choice, position). SplitMix64 is a counter
through a bijection, so any output is had without the ones before it, there is no state to keep, and int64 arithmetic
with wrap-around gives the same bits on every device.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from infer.request import SamplingParams

_GAMMA = 0x9E3779B97F4A7C15  # the step of SplitMix64's counter: 2^64 / golden ratio, odd
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))  # (shift, multiplier) of its three rounds
_MASK = (1 << 64) - 1

# 53-bit integers to (0, 1): the factor is the float32 under 2**-53, so that the largest stays under 1 after rounding.
_UNIT = 2.0**-53 * (1 - 2.0**-24)

# Elements of noise made at once: a row of int64 that stays in a CPU's second-level cache, or enough to fill a GPU.
_NOISE_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 23}

# How many of the largest logits are tried before the whole row is sorted. Of real models' distributions nearly all
# reach their top_p within the first; 4096 cost a fifth of a sort of 49,152.
PREFIXES = (256, 4096)


def stream_key(seed: int, choice: int, position: int) -> int:
    """The SplitMix64 state (as a signed 64-bit integer) of the draw at `position` of a request's choice.

    One absorbing round a word: for equal earlier words, different words give different states.
    """
    state = 0
    for word in (seed, choice, position):
        state = ((state ^ word) + _GAMMA) & _MASK
        for shift, factor in _MIX:
            state ^= state >> shift
            state = state * (factor or 1) & _MASK
    return _signed(state)


def counters(ids: Tensor) -> Tensor:
    """What SplitMix64 adds to its state for output number id, for int64 token ids of any shape."""
    return (ids + 1).mul_(_signed(_GAMMA))


def log_exponential(state: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
    """log(e) for e = -log(u), u the uniform of each SplitMix64 state: the negative of standard Gumbel noise.

    state: int64, overwritten; scratch: int64 and out: float32 of its shape; returns out.
    """
    for shift, factor in _MIX:
        torch.bitwise_right_shift(state, shift, out=scratch)
        scratch.bitwise_and_((1 << (64 - shift)) - 1)  # torch shifts in copies of the sign
        state.bitwise_xor_(scratch)
        if factor is not None:
            state.mul_(_signed(factor))
    # u is taken as 1 - w: the winners have small e, and e = -log1p(-w) is exact to float32's relative precision there,
    # where -log(u) near u = 1 has only the 2^-24 steps of float32 left.
    out.copy_(state.bitwise_and_((1 << 53) - 1))
    return out.add_(0.5).mul_(-_UNIT).log1p_().neg_().log_()


def perturbed_max(logits: Tensor, temperatures: Tensor, keys: Tensor, token_counters: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of logit + temperature * gumbel in each row, and its column (the lowest one of equals).

    logits: [rows, width] in any floating dtype; temperatures: float32 [rows]; keys: int64 [rows], from stream_key;
    token_counters: int64 [width]. Returns float32 [rows], int64 [rows].
    """
    num_rows, width = logits.shape
    step = min(num_rows, max(1, _NOISE_CHUNK.get(logits.device.type, 1 << 16) // width))
    state = torch.empty(step, width, dtype=torch.int64, device=logits.device)
    scratch, noise = torch.empty_like(state), torch.empty_like(state, dtype=torch.float32)
    values, columns = [], []
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        size = rows.stop - first
        torch.add(keys[rows, None], token_counters, out=state[:size])
        log_exponential(state[:size], scratch[:size], noise[:size])
        value, column = noise[:size].mul_(-temperatures[rows, None]).add_(logits[rows].float()).max(-1)
        values.append(value)
        columns.append(column)
    return torch.cat(values), torch.cat(columns)


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row by (value falling, column rising): float32 [rows, k] and int64 columns [rows, k].

    A NaN counts as larger than everything. k is cut to the width.
    """
    width = logits.shape[-1]
    if k >= width:
        values, columns = torch.sort(logits, dim=-1, descending=True, stable=True)
        return values.float(), columns
    # One more than asked for: the set of the k largest is in doubt only where entries k and k + 1 are equal.
    values, columns = logits.topk(k + 1, dim=-1)
    last = values[:, k - 1 : k]
    doubtful = (last == values[:, k:]).squeeze(-1).nonzero().squeeze(-1)
    values, columns = values[:, :k], columns[:, :k]
    if len(doubtful):
        columns[doubtful] = _lowest_of_equals(logits[doubtful], values[doubtful], columns[doubtful], last[doubtful])
    return in_order(values.float(), columns)


def _lowest_of_equals(logits: Tensor, values: Tensor, columns: Tensor, last: Tensor) -> Tensor:
    """`columns` with the entries whose value is `last` [rows, 1] replaced by the lowest columns of that value."""
    open_slots = values == last
    needed = open_slots.sum(-1, keepdim=True)
    most, width = int(needed.max()), logits.shape[-1]
    from_end = torch.arange(width, 0, -1, dtype=torch.int32, device=logits.device)
    lowest = width - torch.where(logits == last, from_end, 0).topk(most, dim=-1).values
    columns = columns.clone()
    # Both masks are read in row-major order and have `needed` entries in each row.
    columns[open_slots] = lowest[torch.arange(most, device=logits.device) < needed].long()
    return columns


def in_order(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Both [rows, k], sorted by (value falling, id rising)."""
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


@dataclass
class Draws:
    """What the draws of some rows depend on besides logits: one entry a row. Made by `draws_of`."""

    temperature: Tensor  # float32
    key: Tensor  # int64, from stream_key
    top_k: Tensor  # int64, the vocabulary's size where off
    top_p: Tensor  # float64, inf where off
    log_min_p: Tensor  # float32, -inf where off

    def __getitem__(self, rows: Tensor) -> "Draws":
        return Draws(self.temperature[rows], self.key[rows], self.top_k[rows], self.top_p[rows], self.log_min_p[rows])


def draws_of(params: list[SamplingParams], keys: list[int], vocab_size: int, device: torch.device) -> Draws:
    """The parameters of `len(params)` rows, none of them greedy, as tensors."""

    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    return Draws(
        temperature=column([p.temperature for p in params], torch.float32),
        key=column(keys, torch.int64),
        top_k=column(top_k, torch.int64),
        top_p=column([p.top_p if p.top_p < 1 else math.inf for p in params], torch.float64),
        log_min_p=column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], torch.float32),
    )


def draw(values: Tensor, ids: Tensor, draws: Draws, mass: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """Draws from the candidates that min_p, top_k and top_p leave, each relative to what the one before left.

    values: float32 [rows, m], ids: int64 [rows, m]: the m largest logits in `largest`'s order. mass: float64 [rows],
    used only where all m survive min_p and top_k: what survives in the whole row, from `surviving_mass`, or inf where
    that is not known. whole: whether there are no other candidates. Returns int64 tokens [rows] (-1 where the largest
    logit is not finite) and bool [rows]: whether the m candidates were enough to decide; the token means nothing where
    they were not.
    """
    scaled = (values - values[:, :1]) / draws.temperature[:, None]
    place = torch.arange(values.shape[-1], device=values.device)
    alive = (place < draws.top_k[:, None]) & (scaled >= draws.log_min_p[:, None]) & (values > -math.inf)
    # The survivors of top_k and min_p are the first ones; all are known if one known candidate is not among them.
    known = ~alive[:, -1] | whole
    weights = scaled.double().exp().mul_(alive)
    total = torch.where(known, weights.sum(-1), mass)
    kept = alive & (weights.cumsum(-1) - weights < (draws.top_p * total)[:, None])
    kept[:, 0] = True

    state = counters(ids).add_(draws.key[:, None])
    scores = log_exponential(state, torch.empty_like(state), torch.empty_like(values))
    scores = scores.mul_(-draws.temperature[:, None]).add_(values).masked_fill_(~kept, -math.inf)
    best = scores.amax(-1, keepdim=True)
    tokens = ids.masked_fill(scores < best, torch.iinfo(torch.int64).max).amin(-1)
    return tokens.masked_fill_(~values[:, 0].isfinite(), -1), known | ~kept[:, -1]


def surviving_mass(logits: Tensor, draws: Draws) -> Tensor:
    """The sum over a float32 row of exp((logit - largest) / temperature) of what min_p leaves: float64 [rows]."""
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(draws.temperature[:, None])
    if bool((draws.log_min_p > -math.inf).any()):
        scaled.masked_fill_(scaled < draws.log_min_p[:, None], -math.inf)
    return scaled.exp_().sum(-1, dtype=torch.float64)


def draw_from_rows(logits: Tensor, draws: Draws) -> Tensor:
    """Tokens, int64 [rows], from whole rows of logits [rows, vocab] under any truncation; -1 as in `draw`.

    Tries the largest few hundred first, and sorts only the rows whose probability is spread wider than that.
    """
    logits, vocab_size = logits.float(), logits.shape[-1]
    tokens = torch.full((len(logits),), -1, dtype=torch.int64, device=logits.device)
    mass = torch.full((len(logits),), math.inf, dtype=torch.float64, device=logits.device)
    nucleus = ((draws.top_p < math.inf) & (draws.top_k == vocab_size)).nonzero().squeeze(-1)
    if len(nucleus):
        mass[nucleus] = surviving_mass(logits[nucleus], draws[nucleus])
    pending = torch.arange(len(logits), device=logits.device)
    for size in (*(prefix for prefix in PREFIXES if prefix < vocab_size), vocab_size):
        part = logits if len(pending) == len(logits) else logits[pending]
        values, ids = largest(part, size)
        drawn, decided = draw(values, ids, draws[pending], mass[pending], whole=size == vocab_size)
        tokens[pending[decided]] = drawn[decided]
        pending = pending[~decided]
        if not len(pending):
            break
    return tokens


def _signed(word: int) -> int:
    """An unsigned 64-bit integer as the int64 of the same bits."""
    return word - (1 << 64) if word >> 63 else word
