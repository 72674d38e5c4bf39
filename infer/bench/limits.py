"""The least time a run can take on some hardware: a roofline (Williams, Waterman and Patterson, 2009). No torch here.

A step reads its weights and the keys and values of its sequences, and multiplies; it takes at least the longer of both:

    seconds >= max(bytes read / memory bandwidth, 2 * parameters * rows / matrix rate)
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infer.models.config import ModelConfig

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Hardware:
    """What was measured. bandwidth: bytes read per second; rate: matrix operations per second, for a model in
    `dtype`.

    Both are of all devices together; words: which they are, for people.
    """

    name: str
    words: str
    dtype: str
    bandwidth: float
    rate: float

    def best(self, other: "Hardware | None") -> "Hardware":
        """The better of two measurements: on a shared machine each is a lower bound of what the hardware can."""
        if other is None:
            return self
        bandwidth, rate = max(self.bandwidth, other.bandwidth), max(self.rate, other.rate)
        return Hardware(self.name, self.words, self.dtype, bandwidth, rate)

    def __str__(self) -> str:
        return (
            f"{self.words}: {self.bandwidth / 1e9:.1f} GB/s memory reads, "
            f"{self.rate / 1e9:,.0f} GFLOP/s matrix products for {self.dtype}"
        )


@dataclass(frozen=True)
class Limit:
    """Least seconds of a run: until all first tokens are there, and for the tokens after them."""

    prefill: float
    decode: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode


@dataclass(frozen=True)
class Model:
    """What of a model its speed depends on. layers, head: matrix elements of all layers, and of the output head.

    windows: tokens a layer looks back (0: all of them) -> number of such layers.
    kv_bytes: keys and values of one token in one layer. item_bytes: of one weight.
    """

    layers: int
    head: int
    item_bytes: int
    kv_bytes: int
    windows: Counter[int]

    @classmethod
    def of(cls, config: "ModelConfig") -> "Model":
        item_bytes = ITEM_BYTES[config.dtype]
        return cls(
            layers=sum(config.active_parameters),
            head=config.vocab_size * config.hidden_size,
            item_bytes=item_bytes,
            kv_bytes=config.kv_layout(config.num_kv_heads).numel * item_bytes,
            windows=Counter(config.window),
        )

    def run(self, hardware: Hardware, count: int, input_len: int, output_len: int) -> Limit:
        """`count` requests at once, each of input_len tokens, each until it has output_len more.

        The prompts are one step, whatever batches they really go in, and only their last rows meet the head; then come
        output_len - 1 steps of `count` rows. Attention's operations, norms and sampling are left out: small in a short
        context, and what is left is a limit still. The layout does not matter: this is what all devices could do
        together.
        """
        rows = count * input_len
        prefill = self._step(hardware, 2 * (self.layers * rows + self.head * count), 0)
        operations = 2 * (self.layers + self.head) * count
        decode = sum(
            self._step(hardware, operations, count * self._kv_read(input_len + step)) for step in range(1, output_len)
        )
        return Limit(prefill, decode)

    def _kv_read(self, length: int) -> int:
        return sum(n * self.kv_bytes * min(length, window or length) for window, n in self.windows.items())

    def _step(self, hardware: Hardware, operations: int, kv_bytes: int) -> float:
        num_bytes = (self.layers + self.head) * self.item_bytes + kv_bytes
        return max(num_bytes / hardware.bandwidth, operations / hardware.rate)
