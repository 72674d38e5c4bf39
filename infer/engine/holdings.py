"""Which blocks each sequence holds, and which of them others may find. No torch."""

from infer.cache.blocks import BlockPool, block_hash, root_hash
from infer.engine.sequence import Sequence


class Holdings:
    """The pool's blocks in the block tables of sequences, and the prefix cache over them."""

    def __init__(self, pool: BlockPool, enable_prefix_caching: bool):
        self.pool, self.enable_prefix_caching = pool, enable_prefix_caching

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that its block table lacks to cover num_tokens."""
        return max(self.pool.blocks_for(num_tokens) - len(sequence.block_table), 0)

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes its block table cover num_tokens. False if there are not enough free blocks."""
        missing = self.missing(sequence, num_tokens)
        if missing > self.pool.num_free_blocks:
            return False
        sequence.block_table += self.pool.allocate(missing)
        return True

    def release(self, sequence: Sequence) -> None:
        """It holds nothing any more, and begins anew."""
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_announced_blocks = sequence.num_registered = sequence.num_computed = 0

    # ------------------------------------------------------------------ the prefix cache

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks to start from. At least one token is left to compute: a step is needed to draw the next."""
        # Prompt log-probabilities are reported by the step that computes a position, so none may be skipped before the
        # first token (with which they are told), not even by a resume after preemption.
        if not self.enable_prefix_caching or (sequence.wants_prompt_logprobs and not sequence.num_generated):
            return []
        if sequence.avoids_cache:
            return []
        size = self.pool.block_size
        hits = self.pool.cached(self._hashes(sequence, len(sequence.tokens) // size))
        return hits[: (len(sequence.tokens) - 1) // size]

    def take(self, sequence: Sequence, hits: list[int]) -> None:
        """It starts from these blocks of cached_prefix()."""
        self.pool.take(hits)
        sequence.block_table, sequence.has_hits = list(hits), bool(hits)
        sequence.num_registered = len(hits)
        sequence.num_computed = len(hits) * self.pool.block_size

    def register(self, sequence: Sequence) -> None:
        """Blocks whose last token is in this batch can be found from the next sequence on: all ranks run batches in
        order, and within a layer all keys are written before any is read."""
        if not self.enable_prefix_caching:
            return
        full = sequence.num_computed // self.pool.block_size
        hashes = self._hashes(sequence, full)
        for index in range(sequence.num_registered, full):
            self.pool.register(sequence.block_table[index], hashes[index])
        sequence.num_registered = max(sequence.num_registered, full)

    def forget(self, sequence: Sequence) -> None:
        """Nobody finds its blocks any more. By content, not by its block table, which is empty if it was preempted."""
        self.pool.forget(self.pool.known(sequence.hashes))

    def _hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        size = self.pool.block_size
        while len(sequence.hashes) < count:
            at = len(sequence.hashes)
            parent = sequence.hashes[-1] if sequence.hashes else root_hash(sequence.request.cache_salt)
            sequence.hashes.append(block_hash(parent, sequence.tokens[at * size : (at + 1) * size]))
        return sequence.hashes[:count]
