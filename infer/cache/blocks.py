"""Which KV blocks are whose: reference counts, prefix hashes, eviction. Rank 0's book-keeping; no torch, no memory."""

import hashlib
from array import array
from collections.abc import Sequence


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a full block: sha256 over its predecessor's key and its tokens, so that equal keys mean equal
    beginnings. A cryptographic hash, because a crafted collision would leak one user's context to another."""
    return hashlib.sha256(parent + array("i", token_ids).tobytes()).digest()


def root_hash(cache_salt: str | None) -> bytes:
    """What the first block of a chain has for its predecessor's key: another for each salt, so that requests of
    different salts share no block. No chain of blocks comes to it, as no token id begins with these bytes."""
    return b"" if cache_salt is None else hashlib.sha256(b"cache_salt\0" + cache_salt.encode()).digest()


class BlockPool:
    """Hands out block ids and remembers which of them hold a known prefix.

    Every block is either held (reference count > 0) or free; a free block may still be cached, until it is handed out
    again. Free blocks leave in the order they came (least recently used first).
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self._references = [0] * num_blocks
        self._free: dict[int, None] = dict.fromkeys(range(num_blocks))  # ordered: the first is the next to go
        self._block_of: dict[bytes, int] = {}
        self._hash_of: list[bytes | None] = [None] * num_blocks

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks; they leave the prefix cache. The caller has checked num_free_blocks."""
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free"
        blocks = []
        for _ in range(count):
            block = next(iter(self._free))
            del self._free[block]
            self._uncache(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def cached(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of a chain of hashes. Takes no reference."""
        blocks = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def known(self, hashes: Sequence[bytes]) -> list[int]:
        """The cached blocks among these hashes, wherever in their chain. Takes no reference."""
        return [self._block_of[key] for key in hashes if key in self._block_of]

    def num_free_among(self, blocks: Sequence[int]) -> int:
        """How many of these blocks are free now, and so would leave the free list when taken."""
        return sum(self._references[block] == 0 for block in blocks)

    def take(self, blocks: Sequence[int]) -> None:
        """Adds a reference to cached blocks."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops a reference. The last blocks of a sequence become free first, so that prefixes stay longest."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None

    def register(self, block: int, key: bytes) -> None:
        """Makes a full block findable. A second block with the same content stays private."""
        if key not in self._block_of and self._hash_of[block] is None:
            self._block_of[key] = block
            self._hash_of[block] = key

    def forget(self, blocks: Sequence[int]) -> None:
        """Takes blocks out of the prefix cache: their content is not to be trusted."""
        for block in blocks:
            self._uncache(block)

    def check(self) -> None:
        """Raises AssertionError unless the books balance. For tests and idle moments."""
        for block, count in enumerate(self._references):
            assert (count == 0) == (block in self._free), f"block {block}: {count} references, free: {count > 0}"
        for key, block in self._block_of.items():
            assert self._hash_of[block] == key, f"block {block} is listed under another hash"
        assert len(self._block_of) == sum(key is not None for key in self._hash_of)

    def _uncache(self, block: int) -> None:
        key = self._hash_of[block]
        if key is not None:
            del self._block_of[key]
            self._hash_of[block] = None
