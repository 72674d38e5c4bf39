"""Records the ops of a function of tensors once, so that one native call runs them all from then on.

Between two ops the Python interpreter spends some ten microseconds, in modules, in attributes and in the dispatch. A
pipeline stage has hundreds of ops, which at few rows are hardly longer than that. `Tape` calls the same ops on the same
tensors from C++ (kernels/cpu/tape.cpp), so that its results have the same bits.

A recording holds for other inputs only if the function does the same whatever the inputs hold and however many rows
they have. `record` therefore records twice, with inputs of different shapes, and gives no tape where the two differ.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from infer import native
from infer.cache.pages import Pages
from infer.layers.attention import ForwardContext
from infer.models.decoder import Stage

logger = logging.getLogger(__name__)

Function = Callable[[Sequence[Tensor]], Tensor]
Forward = Callable[[Tensor, ForwardContext], Tensor]  # as Stage.forward


class NotRecordable(ValueError):
    """What stands against recording a function."""


@dataclass(frozen=True)
class Slot:
    """A tensor that exists only while the tape runs: an input, or what an op gave."""

    number: int


@dataclass(frozen=True)
class Constant:
    """A tensor that outlives the recording, such as a weight. Two are equal if they are the same object."""

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.tensor is other.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


@dataclass(frozen=True)
class Call:
    """An op and its positional arguments: Slot, Constant, or a plain value."""

    op: torch._ops.OpOverload
    arguments: tuple[Any, ...]


class _Recorder(TorchDispatchMode):
    """Notes every op that runs under it. Slots are numbered as in the native Tape: inputs, then results in order."""

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.calls: list[Call] = []
        self._kept = list(inputs)  # while these live, an id names one tensor alone
        self._slots = {id(tensor): Slot(i) for i, tensor in enumerate(inputs)}
        self._num_slots = len(inputs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No need: nothing is compiled while this records, and torch would import all of Dynamo for it (1.4 s)."""
        return False

    def slot(self, tensor: Tensor) -> Slot:
        if id(tensor) not in self._slots:
            raise NotRecordable("its result is none of its ops' results")
        return self._slots[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append(Call(func, self._arguments(func, args, kwargs or {})))
        results = result if isinstance(result, (tuple, list)) else (result,)
        for position, declared in enumerate(func._schema.returns):
            value = results[position]
            if not isinstance(value, Tensor):
                raise NotRecordable(f"{func} gives a {declared.type}")
            self._kept.append(value)
            self._slots[id(value)] = Slot(self._num_slots + position)
        self._num_slots += len(func._schema.returns)
        return result

    def _arguments(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        declared = func._schema.arguments
        values = list(args)
        if kwargs:  # by position, with the defaults of those between
            values += [kwargs.get(a.name, a.default_value) for a in declared[len(args) :]]
        return tuple(self._value(func, value) for value in values)

    def _value(self, func: Any, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._slots.get(id(value)) or Constant(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
            return tuple(value)
        raise NotRecordable(f"{func} takes {value!r}")


def record(function: Function, *examples: Sequence[Tensor]) -> Function | None:
    """A faster equivalent of `function`, or None, with one line in the log, where it cannot be recorded.

    function: from tensors to one tensor, without gradients; it runs once for each of the examples, which must differ in
    whatever may differ between later inputs. The native kernels must be available.
    """
    try:
        tapes = [_recorded(function, example) for example in examples]
        if any(tape != tapes[0] for tape in tapes):
            raise NotRecordable("its ops depend on its inputs")
        return _native(*tapes[0], num_inputs=len(examples[0]))
    except NotRecordable as reason:
        logger.warning("the ops of a stage are called one by one from Python, which is slower: %s", reason)
        return None


def record_stage(stage: Stage, pages: Pages) -> Forward:
    """The stage's `forward` as one native call where that can be, else the stage itself.

    All tensor-parallel ranks of the stage call it together, since it runs the stage. Nothing is written to the pages.
    """
    if not (pages.k[0].is_cpu and native.is_loaded()):
        return stage
    num_layers = len(pages.k)

    def run(inputs: Sequence[Tensor]) -> Tensor:
        x, positions, slots, block_table, query_start, seq_lens = inputs[:6]
        k_pages, v_pages = list(inputs[6 : 6 + num_layers]), list(inputs[6 + num_layers :])
        return stage(x, ForwardContext(positions, slots, block_table, query_start, seq_lens, k_pages, v_pages))

    recorded = record(run, *(_example(stage, pages, rows) for rows in (3, 5)))
    if recorded is None:
        return stage
    replay = recorded  # for the type checker: not None

    def forward(x: Tensor, c: ForwardContext) -> Tensor:
        return replay([x, c.positions, c.slots, c.block_table, c.query_start, c.seq_lens, *c.k_pages, *c.v_pages])

    return forward


def _example(stage: Stage, pages: Pages, rows: int) -> list[Tensor]:
    """Inputs of a sequence of one token and one of the others, which have no place in the cache."""
    x = torch.zeros(rows, dtype=torch.int64)
    if not stage.is_first:
        x = torch.zeros(rows, stage.config.hidden_size, dtype=pages.k[0].dtype)
    lengths = torch.tensor([1, rows - 1], dtype=torch.int32)
    return [
        x,
        torch.zeros(rows, dtype=torch.int64),
        torch.full((rows,), -1),
        torch.zeros(2, -(-rows // pages.k[0].shape[1]), dtype=torch.int32),
        torch.tensor([0, 1, rows], dtype=torch.int32),
        lengths,
        *pages.k,
        *pages.v,
    ]


def _recorded(function: Function, inputs: Sequence[Tensor]) -> tuple[list[Call], Slot]:
    with torch.inference_mode(), _Recorder(inputs) as recorder:
        result = function(inputs)
    return recorder.calls, recorder.slot(result)


def _native(calls: list[Call], result: Slot, num_inputs: int) -> Function:
    tape = torch.classes.infer.Tape(num_inputs)
    for call in calls:
        slots = [_slot(value) for value in call.arguments]
        tape.add(call.op._schema.name, call.op._schema.overload_name, [_plain(v) for v in call.arguments], slots)
    tape.finish([result.number])
    return lambda inputs: tape.run(inputs)[0]


def _slot(value: Any) -> int:
    """As Tape.add has it: a slot, -1 for a value, or -2 for an empty list, whose type no value can tell."""
    if isinstance(value, Slot):
        return value.number
    return -2 if value == () else -1


def _plain(value: Any) -> Any:
    if isinstance(value, Constant):
        return value.tensor
    if isinstance(value, tuple):
        return list(value) or None
    return None if isinstance(value, Slot) else value
