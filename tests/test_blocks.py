"""The block pool's books: references, prefix hashes, eviction."""

import random

import pytest

from infer.cache.blocks import BlockPool, block_hash

SIZE = 4


def chain(tokens):
    """The keys of the full blocks of a sequence."""
    keys, parent = [], b""
    for at in range(0, len(tokens) - SIZE + 1, SIZE):
        parent = block_hash(parent, tokens[at : at + SIZE])
        keys.append(parent)
    return keys


def filled(pool, tokens):
    """Blocks that hold these tokens, held and registered."""
    keys = chain(tokens)
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.register(block, key)
    return blocks


def test_a_key_stands_for_everything_before():
    keys = chain([1, 2, 3, 4, 5, 6, 7, 8])
    assert keys[0] == chain([1, 2, 3, 4])[0] and len(keys) == 2
    assert keys[1] != chain([0, 2, 3, 4, 5, 6, 7, 8])[1], "same tokens after another beginning"
    assert keys[1] != chain([5, 6, 7, 8])[0]
    assert all(len(key) == 32 for key in keys)
    assert block_hash(b"", [1, 23]) != block_hash(b"", [12, 3])


def test_the_number_of_blocks():
    pool = BlockPool(8, SIZE)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_blocks_are_handed_out_once_and_come_back():
    pool = BlockPool(3, SIZE)
    blocks = pool.allocate(3)
    assert sorted(blocks) == [0, 1, 2] and pool.num_free_blocks == 0
    with pytest.raises(AssertionError, match="1 blocks asked for, 0 free"):
        pool.allocate(1)
    pool.release(blocks)
    assert pool.num_free_blocks == 3
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks[:1])
    pool.check()


def test_a_shared_block_is_free_when_all_have_let_go():
    pool = BlockPool(4, SIZE)
    blocks = filled(pool, range(8))
    pool.take(blocks)
    pool.release(blocks)
    assert pool.num_free_blocks == 2
    assert pool.num_free_among(blocks) == 0
    pool.release(blocks)
    assert pool.num_free_blocks == 4 and pool.num_free_among(blocks) == 2
    pool.check()


def test_a_free_block_can_still_be_found():
    pool = BlockPool(4, SIZE)
    blocks = filled(pool, range(8))
    pool.release(blocks)
    assert pool.cached(chain(range(8))) == blocks
    pool.take(blocks)
    assert pool.num_free_blocks == 2
    pool.check()


def test_the_longest_known_beginning():
    pool = BlockPool(8, SIZE)
    blocks = filled(pool, range(12))
    assert pool.cached(chain([*range(8), 50, 51, 52, 53])) == blocks[:2]
    assert pool.cached(chain([50, *range(1, 12)])) == []
    keys = chain(range(12))
    pool.forget(blocks[1:2])
    assert pool.cached(keys) == blocks[:1], "what follows a gap is no beginning"
    assert pool.known(keys) == [blocks[0], blocks[2]]
    pool.check()


def test_the_least_recently_used_goes_first_and_the_end_before_the_beginning():
    pool = BlockPool(4, SIZE)
    old, young = filled(pool, range(8)), filled(pool, range(100, 108))
    pool.release(old)
    pool.release(young)
    assert pool.allocate(1) == [old[1]]
    assert pool.cached(chain(range(8))) == old[:1], "its beginning is still of use"
    assert pool.cached(chain(range(100, 108))) == young
    pool.take(pool.cached(chain(range(8))))  # used again: now the younger one's end is the next to go
    assert pool.allocate(1) == [young[1]]
    pool.check()


def test_new_blocks_go_before_cached_ones():
    pool = BlockPool(4, SIZE)
    pool.release(filled(pool, range(8)))
    pool.allocate(2)
    assert len(pool.cached(chain(range(8)))) == 2


def test_what_is_handed_out_is_no_longer_found():
    pool = BlockPool(2, SIZE)
    pool.release(filled(pool, range(8)))
    pool.allocate(2)
    assert pool.cached(chain(range(8))) == []
    pool.check()


def test_the_same_content_twice_stays_private():
    pool = BlockPool(4, SIZE)
    first, second = filled(pool, range(8)), filled(pool, range(8))
    assert pool.cached(chain(range(8))) == first
    pool.release(first)
    pool.release(second)
    pool.check()
    assert pool.num_free_blocks == 4


def test_forgotten_content_is_not_found():
    pool = BlockPool(4, SIZE)
    blocks = filled(pool, range(8))
    pool.forget(blocks)
    assert pool.cached(chain(range(8))) == []
    pool.release(blocks)
    pool.check()


def test_check_finds_unbalanced_books():
    pool = BlockPool(2, SIZE)
    pool._references[0] = 1
    with pytest.raises(AssertionError, match="block 0"):
        pool.check()


def test_random_use_keeps_the_books_balanced():
    for seed in range(100):
        rng, pool = random.Random(seed), BlockPool(12, SIZE)
        held, content = [], {}  # content: block -> its tokens' key, as a model of the memory
        for _ in range(200):
            if held and rng.random() < 0.45:
                pool.release(held.pop(rng.randrange(len(held))))
                continue
            keys = chain([rng.randrange(2) for _ in range(SIZE * rng.randrange(1, 4))])
            hits = pool.cached(keys)
            missing = len(keys) - len(hits)
            assert [content[block] for block in hits] == keys[: len(hits)], "a block was found under content it lost"
            if missing > pool.num_free_blocks - pool.num_free_among(hits):
                continue
            pool.take(hits)
            blocks = hits + pool.allocate(missing)
            for block, key in zip(blocks[len(hits) :], keys[len(hits) :], strict=True):
                content[block] = key
                pool.register(block, key)
            held.append(blocks)
            pool.check()
            assert pool.num_free_blocks == 12 - len({block for blocks in held for block in blocks})
        for blocks in held:
            pool.release(blocks)
        pool.check()
        assert pool.num_free_blocks == 12
