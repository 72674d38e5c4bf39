"""The noise of random draws: a counter-based generator and its Gumbel variables.

A token is drawn with the Gumbel-max trick: argmax of logit + temperature * g, where g = -log(-log(u)) are independent
standard Gumbel variables, has the softmax distribution of logit / temperature (Gumbel 1954; Maddison, Tarlow and Minka,
"A* sampling", 2014). Against an inverse CDF it has two merits: each vocabulary shard perturbs its own part, and the
decision has wide margins, so that the 1e-5 by which logits differ between layouts hardly ever changes a token, where a
CDF over 50,000 entries moves at every one of them.

The uniform u of vocabulary id v is the v-th output of a SplitMix64 generator (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014) whose state is a hash of (seed, choice, position). SplitMix64 is a counter
through a bijection, so any output is had without the ones before it, there is no state to keep, and int64 arithmetic
with wrap-around gives the same bits on every device.
"""

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15  # the step of SplitMix64's counter: 2^64 / golden ratio, odd
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))  # (shift, multiplier) of its three rounds
_MASK = (1 << 64) - 1

# 53-bit integers to (0, 1): the factor is the float32 under 2**-53, so that the largest stays under 1 after rounding.
_UNIT = 2.0**-53 * (1 - 2.0**-24)


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


def _signed(word: int) -> int:
    """An unsigned 64-bit integer as the int64 of the same bits."""
    return word - (1 << 64) if word >> 63 else word
