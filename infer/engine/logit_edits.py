"""What a request changes in its logits before a token is chosen: grammar, allowed tokens, minimum length, bad words,
bias, penalties.

All of it is elementwise arithmetic in float32 on known token ids, so a vocabulary shard edits its own part and has
bit for bit what the whole row would have there.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infer.request import SamplingParams

# The smallest repetition_penalty that is applied as it is. Under it, float32 would make a sound row's logits infinite,
# which is how a broken row looks.
_SMALLEST_DIVISOR = 1e-30


class TokenCounts:
    """The distinct tokens of one row, and how often each was generated. Follows the output as it grows."""

    def __init__(self, prompt_token_ids: NDArray[np.int32]):
        """prompt_token_ids: tokens that count as seen without having been generated."""
        self.ids: NDArray[np.int64] = np.unique(prompt_token_ids).astype(np.int64)  # rising
        self.generated: NDArray[np.int64] = np.zeros(len(self.ids), np.int64)
        self.num_counted = 0  # output[:num_counted] is in `generated`

    def follow(self, output_token_ids: NDArray[np.int32]) -> None:
        """Counts what the output has grown by. The output may only grow."""
        assert len(output_token_ids) >= self.num_counted, "the output of a row got shorter"
        if len(output_token_ids) == self.num_counted:
            return
        new, counts = np.unique(output_token_ids[self.num_counted :], return_counts=True)
        place = np.searchsorted(self.ids, new)
        known = place < len(self.ids)
        known[known] = self.ids[place[known]] == new[known]
        self.generated[place[known]] += counts[known]
        self.ids = np.insert(self.ids, place[~known], new[~known])
        self.generated = np.insert(self.generated, place[~known], counts[~known])
        self.num_counted = len(output_token_ids)


class BadWords:
    """Token sequences that must not be completed, by the token before the last, so that a step looks at few."""

    def __init__(self, sequences: list[list[int]]):
        """sequences: none of them empty."""
        self.single = sorted({sequence[0] for sequence in sequences if len(sequence) == 1})
        self._longer: dict[int, list[list[int]]] = {}
        for sequence in sequences:
            if len(sequence) > 1:
                self._longer.setdefault(sequence[-2], []).append(sequence)

    def forbidden(self, output_token_ids: NDArray[np.int32]) -> set[int]:
        """The tokens that would complete one after this output. As in vLLM, the prompt's tokens begin none."""
        found = set(self.single)
        if self._longer and len(output_token_ids):
            for sequence in self._longer.get(int(output_token_ids[-1]), ()):
                if output_token_ids[1 - len(sequence) :].tolist() == sequence[:-1]:
                    found.add(sequence[-1])
        return found


@dataclass(eq=False)
class SampleRow:
    """One row of logits to draw a token for; kept from step to step by every tensor-parallel rank of the last stage."""

    params: SamplingParams
    seed: int  # 64-bit signed
    choice: int
    position: int  # absolute position of the token to draw = number of known tokens
    prompt_token_ids: NDArray[np.int32]
    output_token_ids: NDArray[np.int32]  # so far; the caller replaces it by a longer one as tokens come
    eos_token_ids: list[int]
    bad_words: BadWords | None = None
    # From the row's grammar, for the token to draw: bit t % 32 of word t // 32 says whether token t may come.
    grammar_mask: NDArray[np.int32] | None = None  # int32 [at least ceil(vocab / 32)]
    grammar_ended: bool = False  # nothing but an end token may come, whatever min_tokens says
    _counts: TokenCounts | None = field(default=None, init=False, repr=False)

    @property
    def forbidden_ids(self) -> set[int]:
        """End and stop tokens while the output is shorter than min_tokens (as in vLLM, ignore_eos does not lift it),
        and what would complete a bad word."""
        found = set() if self.bad_words is None else self.bad_words.forbidden(self.output_token_ids)
        if len(self.output_token_ids) < self.params.min_tokens and not self.grammar_ended:
            found.update(self.eos_token_ids, self.params.stop_token_ids or ())
        return found

    @property
    def is_penalized(self) -> bool:
        """Whether some penalty changes a logit."""
        params = self.params
        if params.repetition_penalty != 1.0:
            return True
        return len(self.output_token_ids) > 0 and (params.frequency_penalty != 0.0 or params.presence_penalty != 0.0)

    @property
    def is_edited(self) -> bool:
        """Whether anything here changes a logit."""
        params = self.params
        if self.grammar_mask is not None or params.logit_bias or params.allowed_token_ids:
            return True
        return self.is_penalized or bool(self.forbidden_ids)

    def counts(self) -> TokenCounts:
        """The tokens that penalties apply to; those of the prompt only where repetition_penalty is on."""
        if self._counts is None:
            repetition = self.params.repetition_penalty != 1.0
            self._counts = TokenCounts(self.prompt_token_ids if repetition else self.prompt_token_ids[:0])
        self._counts.follow(self.output_token_ids)
        return self._counts


def edited_logits(logits: Tensor, rows: list[SampleRow], start: int) -> Tensor:
    """A float32 copy of logits [rows, width] of the token ids [start, start + width), edited as each row asks.

    In vLLM's order: grammar, allowed tokens, minimum length and bad words, bias, penalties. A row with a NaN or +inf
    has a NaN afterwards even if that token was masked, so that a broken row is recognized whatever it may choose from.
    """
    edited = logits.to(torch.float32, copy=True)
    broken = ~(edited.amax(-1) < math.inf)
    _follow_grammars(edited, rows, start)
    _keep_only_allowed(edited, rows, start)
    _forbid(edited, rows, start)
    _add_bias(edited, rows, start)
    _penalize(edited, rows, start)
    edited[:, 0].masked_fill_(broken, math.nan)
    return edited


class _Entries:
    """Collects (row, token) entries of a [rows, width] tensor with some float32 columns each."""

    def __init__(self, start: int, width: int):
        self.start, self.width = start, width
        self._index: list[NDArray[np.int64]] = []
        self._columns: list[NDArray[np.float32]] = []

    def add(self, row: int, ids: NDArray[np.int64], *columns: NDArray[np.floating] | float) -> None:
        """ids of other shards are left out."""
        mine = (ids >= self.start) & (ids < self.start + self.width)
        self._index.append(row * self.width + ids[mine] - self.start)
        stacked = np.empty((len(columns), int(mine.sum())), np.float32)
        for line, column in zip(stacked, columns, strict=True):
            line[:] = column[mine] if isinstance(column, np.ndarray) else column
        self._columns.append(stacked)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices into the flattened tensor, int64 [entries], and float32 [columns, entries]."""
        index = torch.from_numpy(np.concatenate(self._index)).to(device)
        return index, torch.from_numpy(np.concatenate(self._columns, axis=1)).to(device)

    def __bool__(self) -> bool:
        return bool(self._index)


def _follow_grammars(logits: Tensor, rows: list[SampleRow], start: int) -> None:
    masks = {i: row.grammar_mask for i, row in enumerate(rows) if row.grammar_mask is not None}
    if not masks:
        return
    width, first_word = logits.shape[-1], start // 32
    words = np.stack([mask[first_word : -(-(start + width) // 32)] for mask in masks.values()])
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    bits = (torch.from_numpy(words).to(logits.device)[:, :, None] >> shifts).bitwise_and_(1).flatten(1)
    allowed = bits[:, start % 32 : start % 32 + width].bool()
    if len(masks) == len(logits):
        logits.masked_fill_(~allowed, -math.inf)
    else:
        constrained = torch.tensor(list(masks), device=logits.device)
        logits[constrained] = logits[constrained].masked_fill_(~allowed, -math.inf)


def _keep_only_allowed(logits: Tensor, rows: list[SampleRow], start: int) -> None:
    entries, limited = _Entries(start, logits.shape[-1]), []
    for i, row in enumerate(rows):
        if row.params.allowed_token_ids:
            entries.add(i, _ids(row.params.allowed_token_ids))
            limited.append(i)
    if entries:
        index, _ = entries.tensors(logits.device)
        kept = logits.view(-1)[index]
        logits[limited] = -math.inf
        logits.view(-1)[index] = kept


def _forbid(logits: Tensor, rows: list[SampleRow], start: int) -> None:
    entries = _Entries(start, logits.shape[-1])
    for i, row in enumerate(rows):
        if forbidden := row.forbidden_ids:
            entries.add(i, _ids(forbidden))
    if entries:
        index, _ = entries.tensors(logits.device)
        logits.view(-1)[index] = -math.inf


def _add_bias(logits: Tensor, rows: list[SampleRow], start: int) -> None:
    entries = _Entries(start, logits.shape[-1])
    for i, row in enumerate(rows):
        if bias := row.params.logit_bias:
            entries.add(i, _ids(bias), np.fromiter(bias.values(), np.float32, len(bias)))
    if entries:
        index, (added,) = entries.tensors(logits.device)
        flat = logits.view(-1)
        flat[index] = flat[index] + added  # a token has one bias, so no entry comes twice


def _penalize(logits: Tensor, rows: list[SampleRow], start: int) -> None:
    entries = _Entries(start, logits.shape[-1])
    for i, row in enumerate(rows):
        if row.is_penalized:
            counts, params = row.counts(), row.params
            subtracted = params.frequency_penalty * counts.generated + params.presence_penalty * (counts.generated > 0)
            entries.add(i, counts.ids, max(params.repetition_penalty, _SMALLEST_DIVISOR), subtracted)
    if entries:
        index, (repetition, subtracted) = entries.tensors(logits.device)
        flat = logits.view(-1)
        before = flat[index]
        flat[index] = torch.where(before > 0, before / repetition, before * repetition) - subtracted


def _ids(tokens: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(tokens, np.int64)
