"""The one place that reads checkpoints: safetensors files, of which every rank reads only the blocks it holds."""

import difflib
import hashlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from infer.layers.declare import declared
from infer.models.config import ModelConfig
from infer.models.fields import read_json
from infer.models.recognize import PLAIN_WANTED, QUANTIZED_DTYPES, quantized_tensors
from infer.parallel.placement import Source

logger = logging.getLogger("infer.weights")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # safetensors' names -> bytes of an element
# Start of a tensor's name -> what may stand there instead. A model saved without its head has no "model." or so before
# its names; that of one that sees is part of another; and later versions of transformers named some tensors anew.
OTHER_STARTS = {
    "model.": ("", "language_model.model.", "model.language_model."),
    "transformer.": ("",),
    "gpt_neox.": ("",),
    "lm_head.": ("language_model.lm_head.",),
    "embed_out.": ("lm_head.",),
}
TIED_ROWS = 64  # of a head and an embedding, by which it is told whether they are one
DUMMY_STD = 0.02
DUMMY_BLOCK_ROWS = 1024


class Checkpoint:
    """The tensors of a checkpoint directory, opened file by file as they are asked for.

    bytes_read counts the payload of every block read, in the checkpoint's own dtype: what must come off the disk,
    short of whole pages (files are mapped; a block of columns narrower than a page touches its neighbours' too).

    Every method raises ValueError, naming file and tensor, for what is missing, corrupt or of the wrong shape or dtype.
    """

    def __init__(self, path: Path):
        self.path = path
        self.bytes_read = 0
        self._open: dict[str, Any] = {}
        self._names: dict[str, set[str]] = {}  # file -> its tensors
        self._listing = self._find_listing()
        self._file_of = self._read_index() if self._listing == INDEX else self._all_in(self._listing)
        if found := quantized_tensors(self._file_of):
            raise ValueError(f"{self.path / self._listing}: {found}; {PLAIN_WANTED}")

    def check(self, source: Source) -> None:
        """Whether the tensor is there, with the declared shape and a dtype we read. Reads headers only."""
        file, name = self._locate(source.name)
        view = self._slice(file, name)
        if (shape := tuple(view.get_shape())) != source.shape:
            raise ValueError(
                f"{self.path / file}: tensor {name} has shape {list(shape)}, but config.json makes it "
                f"{list(source.shape)}"
            )
        if (dtype := view.get_dtype()) not in FLOATS:
            method = f" ({QUANTIZED_DTYPES[dtype]})" if dtype in QUANTIZED_DTYPES else ""
            raise ValueError(
                f"{self.path / file}: tensor {name} has dtype {dtype}{method}, which is not supported; "
                f"supported are {', '.join(FLOATS)} (quantized checkpoints are not)"
            )

    def read(self, source: Source, out: Tensor) -> None:
        """Copies the block that this rank holds into out (its shape), to its device and dtype. Checked before."""
        file, name = self._locate(source.name)
        view = self._slice(file, name)
        try:
            out.copy_(_arranged(source, view[tuple(slice(held.start, held.stop) for held in source.part)]))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path / file}: tensor {name} cannot be read: {error}") from None
        self.bytes_read += math.prod(source.local_shape) * FLOATS[view.get_dtype()]

    @property
    def names(self) -> set[str]:
        """Every tensor the checkpoint says it holds."""
        return set(self._file_of)

    def _find_listing(self) -> str:
        """The file that says which tensors there are: the only safetensors file, or the index."""
        for file in (SINGLE, INDEX):
            if (self.path / file).exists():
                return file
        files = sorted(file.name for file in self.path.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        if files:
            raise ValueError(f"{self.path} has {len(files)} safetensors files but no {INDEX} that says what is where")
        others = sorted(f.name for ending in ("*.bin", "*.pt", "*.pth", "*.gguf") for f in self.path.glob(ending))
        found = f"; {', '.join(others[:3])} cannot be used, only safetensors can" if others else ""
        if any(name.endswith(".gguf") for name in others):
            found += f" (GGUF: {PLAIN_WANTED})"
        raise ValueError(f"{self.path} has neither {SINGLE} nor {INDEX}{found}")

    def _all_in(self, file: str) -> dict[str, str]:
        return dict.fromkeys(self._tensors_of(file), file)

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name."""
        file = self.path / INDEX
        weight_map = read_json(file).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{file} has no weight_map, an object of tensor name -> file name")
        for name, shard in weight_map.items():
            # A checkpoint's files lie beside its index; a path elsewhere would read what it has no business with.
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(f"{file}: tensor {name} must be in a file of the same directory, not {shard!r}")
        for shard in sorted(set(weight_map.values())):
            if not (self.path / shard).is_file():
                name = next(name for name, where in weight_map.items() if where == shard)
                raise ValueError(f"{file}: tensor {name} is said to be in {shard}, which is not there")
        return weight_map

    def _locate(self, name: str) -> tuple[str, str]:
        """(file, name in the checkpoint), by whichever of its names a tensor goes there."""
        for known in names_of(name):
            if known in self._file_of:
                return self._file_of[known], known
        hint = ""
        if name == "lm_head.weight":
            hint = "; if it shares the embedding's, say so with --hf-overrides '{\"tie_word_embeddings\": true}'"
        elif near := difflib.get_close_matches(name, self._file_of, n=1):
            hint = f"; the nearest name is {near[0]}"
        raise ValueError(f"{self.path / self._listing}: tensor {name} is missing{hint}")

    def _slice(self, file: str, name: str) -> Any:
        if name not in self._tensors_of(file):
            raise ValueError(f"{self.path / file}: tensor {name} is missing, though {INDEX} says it is there")
        return self._open[file].get_slice(name)

    def _tensors_of(self, file: str) -> set[str]:
        """The tensors in a file, which is opened once and stays open."""
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.path / file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.path / file} is truncated, corrupt or unreadable: {error}") from None
            self._names[file] = set(self._open[file].keys())
        return self._names[file]


def names_of(name: str) -> Iterator[str]:
    """The names that a tensor may have in a checkpoint, the one it is declared with first."""
    yield name
    for start, others in OTHER_STARTS.items():
        if name.startswith(start):
            yield from (other + name.removeprefix(start) for other in others)


def _arranged(source: Source, block: Tensor) -> Tensor:
    """A block as the checkpoint has it -> as the parameter does."""
    if source.transposed:
        block = block.t()
    if source.order is not None:
        block = block[list(source.order)]
    if source.offset:
        block = block.float() + source.offset
    return block


def check_weights(stage: nn.Module, checkpoint: Checkpoint) -> None:
    """Whether the checkpoint has every tensor the stage is declared to be made from. Reads headers only."""
    for _, spec in declared(stage):
        for source in spec.sources:
            checkpoint.check(source)


def check_tied(c: ModelConfig, checkpoint: Checkpoint) -> None:
    """Whether a head that is said to share the embedding's weight does. Fine-tuning may part the two, and config.json
    not say so; many checkpoints hold an equal copy, which is nobody's mistake. Looks at the first rows of both.

    Raises ValueError where they differ.
    """
    head = f"{c.names.head}.weight"
    if not c.tie_embeddings or not any(name in checkpoint.names for name in names_of(head)):
        return
    part = (range(min(TIED_ROWS, c.vocab_size)), range(c.hidden_size))
    rows = []
    for name in (f"{c.names.embed}.weight", head):
        source = Source(name, (c.vocab_size, c.hidden_size), part)
        checkpoint.check(source)
        rows.append(torch.empty(source.local_shape))
        checkpoint.read(source, rows[-1])
    if not torch.equal(*rows):
        raise ValueError(
            f"{checkpoint.path}: config.json ties the head to the embedding (tie_word_embeddings), but {head} is there "
            "and differs; use it with --hf-overrides '{\"tie_word_embeddings\": false}', or remove it"
        )


def load_weights(stage: nn.Module, checkpoint: Checkpoint) -> None:
    """Fills every declared parameter with the blocks it is made of; nothing of other ranks is read.

    All of them are checked before the first is read, so that a wrong checkpoint fails in seconds.
    """
    parameters = list(declared(stage))
    check_weights(stage, checkpoint)
    for parameter, spec in parameters:
        row = 0
        for source in spec.sources:
            rows = source.local_shape[0]
            checkpoint.read(source, parameter[row : row + rows])
            row += rows
    used = {source.name for _, spec in parameters for source in spec.sources}
    logger.debug("%d tensors of the checkpoint are not this rank's", len(checkpoint.names) - len(used))


def init_dummy_weights(stage: nn.Module, seed: int) -> None:
    """Random weights without a checkpoint: uniform, of standard deviation 0.02; norms are 1.

    A value depends on the seed, the tensor's name and the place in it, so that every layout is the same model. Each
    block of 1024 rows has a generator of its own; a rank generates those blocks that hold rows of its own. A GPU
    generates its own numbers, which are not those of a CPU nor of every other kind of GPU.
    """
    for parameter, spec in declared(stage):
        if spec.init == "ones":
            parameter.fill_(1.0)
            continue
        row = 0
        for source in spec.sources:
            rows = source.local_shape[0]
            _fill_random(source, parameter[row : row + rows], seed)
            row += rows


def _fill_random(source: Source, out: Tensor, seed: int) -> None:
    held, columns = source.part[0], [slice(part.start, part.stop) for part in source.part[1:]]
    bound = DUMMY_STD * math.sqrt(3)
    as_it_comes = not source.transposed and source.order is None
    whole = out if as_it_comes else torch.empty(source.held_shape, device=out.device)
    for block in range(held.start // DUMMY_BLOCK_ROWS, (held.stop - 1) // DUMMY_BLOCK_ROWS + 1):
        first = block * DUMMY_BLOCK_ROWS
        last = min(first + DUMMY_BLOCK_ROWS, source.shape[0])
        digest = hashlib.sha256(f"{seed}/{source.name}/{block}".encode()).digest()
        generator = torch.Generator(out.device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        values = torch.empty((last - first, *source.shape[1:]), device=out.device)
        values.uniform_(-bound, bound, generator=generator)
        start, stop = max(first, held.start), min(last, held.stop)
        whole[start - held.start : stop - held.start].copy_(values[(slice(start - first, stop - first), *columns)])
    if not as_it_comes:
        out.copy_(_arranged(source, whole))
