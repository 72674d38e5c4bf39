"""The arithmetic of drawing a token from a truncated distribution.

Every function here works row by row, and a row's result is a function of that row alone:

- Largest logits (ops.largest) are ordered by (value falling, token id rising), a total order, so "the k largest" is one
  set however the kernels break ties, and whatever larger k a neighbour asks for.
- Sums over a row are accumulated in float64. Kernels may add in another order when the number of rows or threads
  changes; in float64 that moves a sum by about 1e-16 of itself, nine orders of magnitude under the resolution of the
  float32 logits it is compared with.
- Noise is a function of the row's key and the token id (infer/noise.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from infer import ops
from infer.noise import counters, log_exponential
from infer.request import SamplingParams

# How many of the largest logits are tried before the whole row is sorted. Of real models' distributions nearly all
# reach their top_p within the first; 4096 cost a fifth of a sort of 49,152.
PREFIXES = (256, 4096)


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

    values: float32 [rows, m], ids: int64 [rows, m]: the m largest logits in that order. mass: float64 [rows],
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
        values, ids = ops.largest(part, size)
        drawn, decided = draw(values, ids, draws[pending], mass[pending], whole=size == vocab_size)
        tokens[pending[decided]] = drawn[decided]
        pending = pending[~decided]
        if not len(pending):
            break
    return tokens
