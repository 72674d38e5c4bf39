"""Logits to tokens, on the tensor-parallel ranks of the last stage.

Every rank holds the logits of a range of the vocabulary, calls the sampler with the same rows, and takes the same path
for each from its parameters alone, so that the collectives match. The group's first rank has the result. What travels:

- greedy, and random without truncation: each rank's best (value, token id), perturbed by noise where random;
- random with a small top_k: each rank's k largest logits;
- all else (top_p or min_p without top_k, logprobs): the rows themselves.

A token depends on its own row alone: not on other rows in the batch, not on how the vocabulary is split (see
infer/noise.py for the noise, and draw.py for why sums and ties are safe).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import torch
from torch import Tensor

from infer import ops
from infer.engine.draw import draw, draw_from_rows, draws_of
from infer.engine.logit_edits import SampleRow, edited_logits
from infer.noise import stream_key
from infer.ops_sampling import in_order
from infer.parallel.groups import Group
from infer.request import SamplingParams, TokenLogprobs

__all__ = ["SampleResult", "SampleRow", "Sampler"]

# The largest top_k whose candidates are gathered shard by shard; a larger one gathers the rows.
MAX_GATHERED_TOP_K = 1024

# Whole rows are gathered and worked on so many elements at a time (64 MiB in float32).
MAX_ELEMENTS_AT_ONCE = 1 << 24


@dataclass
class SampleResult:
    """What a step drew, on the sampling rank; one entry a row."""

    token_ids: list[int]  # -1 where no token can be drawn: the logits held NaN or +inf, or no token is left
    logprobs: list[TokenLogprobs | None]  # where params.logprobs is not None and a token was drawn


class _Path(Enum):
    BEST = "the best of each shard"
    TOP_K = "the k largest of each shard"
    ROWS = "the whole rows"


class Sampler:
    """Draws tokens from logits that are split over a tensor-parallel group by token id."""

    def __init__(self, tp: Group, vocab_starts: list[int]):
        """vocab_starts: rank i holds the token ids [vocab_starts[i], vocab_starts[i + 1]); the last is the vocabulary's
        size. Raises ValueError if some rank would hold none."""
        rising = all(a < b for a, b in pairwise(vocab_starts))
        if len(vocab_starts) != tp.size + 1 or vocab_starts[0] != 0 or not rising:
            raise ValueError(f"vocab_starts must be {tp.size + 1} rising integers from 0, not {vocab_starts}")
        self.tp = tp
        self.vocab_size = vocab_starts[-1]
        self.widths = [b - a for a, b in pairwise(vocab_starts)]
        self.start, self.width = vocab_starts[tp.index], self.widths[tp.index]

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: list[SampleRow]) -> SampleResult | None:
        """Draws one token a row. logits: this rank's [rows, local_vocab] in float32, bfloat16 or float16; not changed.

        Called by all ranks of the group together, with the same rows. The result is on the first rank, None elsewhere.
        """
        self._check_shape(logits, len(rows))
        result = SampleResult([-1] * len(rows), [None] * len(rows))
        members: dict[_Path, list[int]] = {path: [] for path in _Path}
        for i, row in enumerate(rows):
            members[_path(row.params, self.vocab_size)].append(i)
        for path, indices in members.items():
            if not indices:
                continue
            part, chosen = _select(logits, indices), [rows[i] for i in indices]
            if path is _Path.ROWS:
                tokens, logprobs = self._sample_rows(part, chosen)
            else:
                drawn = self._sample_best(part, chosen) if path is _Path.BEST else self._sample_top_k(part, chosen)
                tokens, logprobs = [] if drawn is None else drawn.tolist(), [None] * len(chosen)
            if self.tp.index == 0:
                for i, token, entry in zip(indices, tokens, logprobs, strict=True):
                    result.token_ids[i], result.logprobs[i] = token, entry
        return result if self.tp.index == 0 else None

    @torch.inference_mode()
    def prompt_logprobs(self, logits: Tensor, targets: list[int], k: list[int]) -> list[TokenLogprobs] | None:
        """The log-probability of a given next token in each row, then those of the row's k most likely ones.

        logits: this rank's [rows, local_vocab], as the model gave them. targets, k: one a row. A row with a NaN or +inf
        gives NaN log-probabilities. On the first rank, None elsewhere.
        """
        self._check_shape(logits, len(targets))
        found: list[TokenLogprobs] = []
        for first, part in self._whole_rows(logits):
            last = first + len(part)
            found += token_logprobs(part, torch.tensor(targets[first:last], device=part.device), k[first:last])
        return found if self.tp.index == 0 else None

    def _sample_best(self, logits: Tensor, rows: list[SampleRow]) -> Tensor | None:
        """Tokens of rows on the path BEST: int64 [rows] on the first rank."""
        values, ids = _best(logits, rows, self.start)
        if self.tp.size > 1:
            candidates = self._gather_candidates(values[:, None], ids[:, None], [1] * self.tp.size)
            if candidates is None:
                return None
            # Shards stand in the order of their ids, and max finds the first of equals: the lowest id.
            values, place = candidates[0].max(-1)
            ids = candidates[1].gather(-1, place[:, None]).squeeze(-1)
        return ids.masked_fill_(~values.isfinite(), -1)

    def _sample_top_k(self, logits: Tensor, rows: list[SampleRow]) -> Tensor | None:
        """Tokens of rows on the path TOP_K: int64 [rows] on the first rank."""
        if any(row.is_edited for row in rows):
            logits = edited_logits(logits, rows, self.start)
        k = max(row.params.top_k for row in rows)
        values, columns = ops.largest(logits, k)
        candidates = self._gather_candidates(values, columns + self.start, [min(k, width) for width in self.widths])
        if candidates is None:
            return None
        values, ids = candidates
        if self.tp.size > 1:
            values, ids = (tensor[:, :k] for tensor in in_order(values, ids))
        draws = draws_of([row.params for row in rows], _keys(rows), self.vocab_size, logits.device)
        # The k largest hold every row's own top_k, so they are all there are, and no other mass is asked for.
        tokens, _ = draw(values, ids, draws, mass=torch.zeros_like(draws.top_p), whole=True)
        return tokens

    def _gather_candidates(self, values: Tensor, ids: Tensor, counts: list[int]) -> tuple[Tensor, Tensor] | None:
        """Values and ids [rows, counts[rank]] of all ranks side by side, on the first rank.

        They travel as one tensor, and in float64, which holds both exactly.
        """
        if self.tp.size == 1:
            return values, ids
        packed = torch.cat([values.double(), ids.double()], dim=-1)
        gathered = self.tp.gather(packed, [2 * count for count in counts])
        if gathered is None:
            return None
        pieces = [piece.chunk(2, dim=-1) for piece in gathered.split([2 * count for count in counts], dim=-1)]
        return torch.cat([v for v, _ in pieces], -1).float(), torch.cat([i for _, i in pieces], -1).long()

    def _sample_rows(self, logits: Tensor, rows: list[SampleRow]) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Tokens and log-probabilities of rows on the path ROWS, on the first rank; nothing elsewhere."""
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        for first, part in self._whole_rows(logits):
            chosen = rows[first : first + len(part)]
            drawn = self._draw_from_rows(part, chosen)
            tokens += drawn.tolist()
            logprobs += _drawn_logprobs(part, drawn, chosen)
        return tokens, logprobs

    def _draw_from_rows(self, logits: Tensor, rows: list[SampleRow]) -> Tensor:
        """Tokens, int64 [rows], from whole rows [rows, vocab]; -1 where none can be drawn."""
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        best = [i for i, row in enumerate(rows) if _takes_best(row.params, self.vocab_size)]
        truncated = [i for i, row in enumerate(rows) if not _takes_best(row.params, self.vocab_size)]
        if best:
            values, ids = _best(_select(logits, best), [rows[i] for i in best], 0)
            tokens[best] = ids.masked_fill_(~values.isfinite(), -1)
        if truncated:
            part, chosen = _select(logits, truncated), [rows[i] for i in truncated]
            if any(row.is_edited for row in chosen):
                part = edited_logits(part, chosen, 0)
            draws = draws_of([row.params for row in chosen], _keys(chosen), self.vocab_size, logits.device)
            tokens[truncated] = draw_from_rows(part, draws)
        return tokens

    def _whole_rows(self, logits: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Some rows at a time: (the first one's index, [some rows, vocab]), on the first rank; nothing elsewhere.

        Every rank must run it to its end: it is what gathers.
        """
        step = max(1, MAX_ELEMENTS_AT_ONCE // self.vocab_size)
        for first in range(0, len(logits), step):
            part = self.tp.gather(logits[first : first + step], self.widths)
            if part is not None:
                yield first, part

    def _check_shape(self, logits: Tensor, num_rows: int) -> None:
        shape = tuple(logits.shape)
        assert shape == (num_rows, self.width), f"logits are {shape}, not [{num_rows}, {self.width}]"


def _best(logits: Tensor, rows: list[SampleRow], start: int) -> tuple[Tensor, Tensor]:
    """Each row's largest logit, perturbed where the row is random, among the token ids from `start` on.

    Returns float32 [rows], int64 token ids [rows]. Only rows that are edited are copied.
    """
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for i, row in enumerate(rows):
        kinds.setdefault((row.params.greedy or row.params.top_k == 1, row.is_edited), []).append(i)
    found: list[tuple[Tensor, Tensor]] = []
    for (greedy, edited), indices in kinds.items():
        part, chosen = _select(logits, indices), [rows[i] for i in indices]
        if edited:
            part = edited_logits(part, chosen, start)
        values, columns = ops.argmax_rows(part) if greedy else _perturbed_max(part, chosen, start)
        found.append((values, columns.add_(start)))
    if len(found) == 1:
        return found[0]
    # Found kind by kind: back into the rows' order.
    order = [i for indices in kinds.values() for i in indices]
    back = torch.tensor(order, device=logits.device).argsort()
    return torch.cat([values for values, _ in found])[back], torch.cat([ids for _, ids in found])[back]


def _perturbed_max(logits: Tensor, rows: list[SampleRow], start: int) -> tuple[Tensor, Tensor]:
    temperatures = torch.tensor([row.params.temperature for row in rows], dtype=torch.float32, device=logits.device)
    keys = torch.tensor(_keys(rows), dtype=torch.int64, device=logits.device)
    return ops.perturbed_max(logits, temperatures, keys, start)


def token_logprobs(logits: Tensor, targets: Tensor, k: list[int]) -> list[TokenLogprobs]:
    """Log-softmax of whole rows [rows, vocab] at one token each and at the row's k most likely ones.

    targets: int64 [rows]; k: one a row, cut to the vocabulary's size. Ranks are places in the order (logit falling,
    token id rising), so that the k most likely ones have ranks 1 to k.
    """
    logits = logits.float()
    vocab_size = logits.shape[-1]
    top = logits.amax(-1, keepdim=True)
    log_total = top.double() + (logits - top).exp_().sum(-1, keepdim=True, dtype=torch.float64).log_()
    at_target = logits.gather(-1, targets[:, None])
    lower = torch.arange(vocab_size, device=logits.device) < targets[:, None]
    ahead = ((logits > at_target) | ((logits == at_target) & lower)).sum(-1, dtype=torch.int32)
    values, ids = ops.largest(logits, max(k)) if max(k) > 0 else (at_target[:, :0], targets[:, None][:, :0])

    tokens = torch.cat([targets[:, None], ids], dim=-1).tolist()
    logprobs = (torch.cat([at_target, values], dim=-1) - log_total).tolist()
    first_ranks = (ahead + 1).tolist()
    return [
        TokenLogprobs(tokens[i][: n + 1], logprobs[i][: n + 1], [first_ranks[i], *range(1, n + 1)])
        for i, n in enumerate(min(wanted, vocab_size) for wanted in k)
    ]


def _drawn_logprobs(logits: Tensor, drawn: Tensor, rows: list[SampleRow]) -> list[TokenLogprobs | None]:
    """Log-probabilities of the drawn tokens in the model's own distribution, where asked for and a token was drawn."""
    tokens = drawn.tolist()
    indices = [i for i, row in enumerate(rows) if row.params.logprobs is not None and tokens[i] >= 0]
    found: list[TokenLogprobs | None] = [None] * len(rows)
    if indices:
        k = [rows[i].params.logprobs or 0 for i in indices]
        for i, entry in zip(indices, token_logprobs(_select(logits, indices), drawn[indices], k), strict=True):
            found[i] = entry
    return found


def _takes_best(params: SamplingParams, vocab_size: int) -> bool:
    """Whether the token is the largest of a row's logits, perturbed or not, without any truncation before."""
    if params.greedy or params.top_k == 1:
        return True
    return not 0 < params.top_k < vocab_size and params.top_p >= 1 and params.min_p <= 0


def _path(params: SamplingParams, vocab_size: int) -> _Path:
    if params.logprobs is not None:
        return _Path.ROWS
    if _takes_best(params, vocab_size):
        return _Path.BEST
    # Under top_k, min_p and top_p need only the k largest.
    return _Path.TOP_K if 0 < params.top_k <= min(MAX_GATHERED_TOP_K, vocab_size - 1) else _Path.ROWS


def _keys(rows: list[SampleRow]) -> list[int]:
    return [stream_key(row.seed, row.choice, row.position) for row in rows]


def _select(logits: Tensor, indices: list[int]) -> Tensor:
    """The rows at rising, distinct `indices`; no copy where that is all of them."""
    return logits if len(indices) == len(logits) else logits[indices]
