"""The compiled kernels: loading infer._kernels, and whether it has a kernel for a call.

The library states its own schemas; one that differs from those here was built from other sources and is not used. A
kernel library that is missing, stale or built for another torch or GPU costs speed, never a result: each case is one
log line, and the ops run their references.
"""

import functools
import logging
import os
import re
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from infer.cache.layout import KvLayout

logger = logging.getLogger("infer.ops")

SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    "act_and_mul": "(Tensor x, str kind) -> Tensor",
    "rotary_write_kv": (
        "(Tensor qkv, Tensor positions, Tensor cos_sin, Tensor? q_norm, Tensor? k_norm, float eps, "
        "Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots, int num_q, int num_kv) -> Tensor"
    ),
    "paged_attention": (
        "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor query_start, Tensor seq_lens, "
        "Tensor kv_map, float scale, int window, float soft_cap) -> Tensor"
    ),
    "rotary_write_latent": (
        "(Tensor q_latent, Tensor q_rope, Tensor kv, Tensor positions, Tensor cos_sin, Tensor norm, float eps, "
        "Tensor(a!) pages, Tensor slots) -> Tensor"
    ),
    "packed_head_linear": "(Tensor x, Tensor packed, int outputs) -> Tensor",
    "packed_linear": "(Tensor x, Tensor packed, Tensor? bias, int outputs) -> Tensor",
    "packed_rows": "(Tensor ids, Tensor packed, int inputs) -> Tensor",
    "group_rows": "(Tensor experts, int first, int count) -> (Tensor, Tensor, Tensor)",
    "packed_grouped_linear": "(Tensor x, Tensor? rows, Tensor starts, Tensor packed, int outputs) -> Tensor",
    "combine_rows": "(Tensor y, Tensor place, Tensor weights) -> Tensor",
    "argmax_rows": "(Tensor logits) -> (Tensor, Tensor)",
    "perturbed_max": "(Tensor logits, Tensor temperatures, Tensor keys, int start) -> (Tensor, Tensor)",
    "largest": "(Tensor logits, int k) -> (Tensor, Tensor)",
}

# Of the CUDA kernels alone: no function of the model calls it by itself (ops_cuda.py does).
CUDA_SCHEMAS = {
    "attend_single_rows": (
        "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor query_start, Tensor seq_lens, "
        "Tensor kv_map, float scale, int window, float soft_cap, Tensor(a!) out) -> ()"
    ),
}

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_HEAD_UNIT, CUDA_MAX_HEAD_DIM, CUDA_MAX_HEADS = 8, 256, 256  # kernels/cuda/ops.h


def use_native(op: str, x: Tensor) -> bool:
    """Whether the native kernel of `op` runs for a tensor like x; every tensor of a call shares its device."""
    if not (_found["library"] if "library" in _found else is_loaded()):  # a call less, hundreds of times a step
        return False
    if x.is_cpu and x.dtype in _NATIVE_DTYPES:
        return True
    if x.is_cuda and x.dtype in _CUDA_DTYPES and cuda_runs(x.get_device()) and _has_cuda_kernel(op):
        return True
    log_fallback(op, f"{x.device.type} tensors of {x.dtype}")
    return False


def covers_heads(num_q: int, dim: int, value_dim: int) -> bool:
    """Whether the CUDA kernel takes so many query heads of dim numbers, whose values have value_dim."""
    if dim % CUDA_HEAD_UNIT == 0 and dim == value_dim <= CUDA_MAX_HEAD_DIM and num_q <= CUDA_MAX_HEADS:
        return True
    log_fallback("paged_attention", f"{num_q} query heads of size {dim} with values of size {value_dim} on CUDA")
    return False


@functools.cache
def log_fallback(op: str, what: str) -> None:
    logger.warning("%s: no native kernel for %s, using the PyTorch reference", op, what)


def decode_runs_on_device(num_q: int, layout: KvLayout, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether every op of a step that only decodes runs a CUDA kernel, so that the host need not wait for the device.

    What a CUDA graph of the step needs: the references read lengths back.
    """
    return (
        is_loaded()
        and device.type == "cuda"
        and dtype in _CUDA_DTYPES
        and cuda_runs(torch.cuda.current_device() if device.index is None else device.index)
        and covers_heads(num_q, layout.key_dim, layout.value_dim)
    )


# What has been found out, once a process. Not functools.cache: torch.compile would trace what is behind it.
_found: dict[str, bool] = {}


def is_loaded() -> bool:
    """Whether the native kernels are used at all. Loads them once; where they cannot be used, one log line says why."""
    if "library" not in _found:
        _found["library"] = _load()
    return _found["library"]


def _load() -> bool:
    choice = os.environ.get("INFER_OPS", "native")
    if choice == "reference":
        logger.info("INFER_OPS=reference: native kernels are off")
        return False
    if choice != "native":
        raise ValueError(f"INFER_OPS is {choice!r}, must be 'native' or 'reference'")
    problem = load_library(library_path())
    if problem:
        logger.warning(
            "native kernels are not used, every op runs its slower PyTorch reference: %s; "
            "to build them: python setup.py build_ext --inplace",
            problem,
        )
        return False
    _register_fakes()
    if not _lacking(CUDA_SCHEMAS):
        _register_cuda_fakes()
    return True


def _has_cuda_kernel(op: str) -> bool:
    key = f"cuda {op}"
    if key not in _found:
        _found[key] = torch._C._dispatch_has_kernel_for_dispatch_key(f"infer::{op}", "CUDA")
    return _found[key]


def cuda_runs(index: int) -> bool:
    """Whether the library's CUDA kernels run on this GPU: tries one, since they were compiled for some GPUs only."""
    key = f"cuda:{index}"
    if key not in _found:
        problem = _cuda_problem(index)
        if problem:
            logger.warning("CUDA kernels are not used, every op runs its slower PyTorch reference: %s", problem)
        _found[key] = not problem
    return _found[key]


def _cuda_problem(index: int) -> str:
    if not _has_cuda_kernel("rms_norm"):
        return f"{library_path().name} was built without them (nvcc is needed: python setup.py build_ext --inplace)"
    lacking = _lacking(CUDA_SCHEMAS)
    if lacking:
        return f"{library_path().name} is out of date: it lacks {lacking}"
    x = torch.ones(1, 8, device=f"cuda:{index}")
    try:
        worked = torch.ops.infer.rms_norm.default(x, x[0], 0.0).sum().item() == 8.0
    except RuntimeError as error:
        return f"they do not run on {torch.cuda.get_device_name(index)} ({str(error).splitlines()[0]})"
    return "" if worked else f"they give wrong results on {torch.cuda.get_device_name(index)}"


def library_path() -> Path:
    return Path(__file__).with_name("_kernels" + sysconfig.get_config_var("EXT_SUFFIX"))


def load_library(path: Path) -> str:
    """Loads the native library at `path`. Returns what stands against using it, or an empty string."""
    if not path.exists():
        return f"{path.name} is not built"
    # Read before loading: a library built for another torch may load and then crash.
    stamp = re.search(rb"infer-kernels torch=([^\0]*)\0", path.read_bytes())
    running = torch.__version__.split("+")[0]
    if stamp is None:
        return f"{path} is not a kernel library of this program"
    if stamp[1].decode() != running:
        return f"{path} was built for torch {stamp[1].decode()}, this is torch {running}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load ({error})"
    lacking = _lacking(SCHEMAS)
    return f"{path} is out of date: it lacks {lacking}" if lacking else ""


def _lacking(schemas: dict[str, str]) -> str:
    """The first of these ops that the loaded library does not have just so, or an empty string."""
    for name, signature in schemas.items():
        op = getattr(torch.ops.infer, name, None)
        if op is None or str(op.default._schema) != f"infer::{name}{signature}":
            return f"{name}{signature}"
    return ""


def problem_with(schemas: dict[str, str]) -> str:
    """What keeps native ops of these schemas from being called, or an empty string.

    For a module whose native ops have no reference here, since they are no functions of tensors alone (collectives).
    """
    if not is_loaded():
        return "the native kernels are not loaded"
    lacking = _lacking(schemas)
    return f"the native kernels are out of date: they lack {lacking}" if lacking else ""


def _register_fakes() -> None:
    """Shapes without data, for torch.compile and meta tensors."""

    @torch.library.register_fake("infer::packed_rows")
    def _(ids: Tensor, packed: Tensor, inputs: int) -> Tensor:
        return packed.new_empty((ids.shape[0], inputs))

    @torch.library.register_fake("infer::packed_linear")
    def _(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        return packed.new_empty((x.shape[0], outputs))

    @torch.library.register_fake("infer::group_rows")
    def _(experts: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = experts.new_empty(experts.numel())
        return rows, experts.new_empty(count + 1, dtype=torch.int32), experts.new_empty(experts.shape)

    @torch.library.register_fake("infer::packed_grouped_linear")
    def _(x: Tensor, rows: Tensor | None, starts: Tensor, packed: Tensor, outputs: int) -> Tensor:
        return x.new_empty((x.shape[0] if rows is None else rows.shape[0], outputs))

    @torch.library.register_fake("infer::combine_rows")
    def _(y: Tensor, place: Tensor, weights: Tensor) -> Tensor:
        return y.new_empty((place.shape[0], y.shape[1]))

    @torch.library.register_fake("infer::argmax_rows")
    def _(logits: Tensor) -> tuple[Tensor, Tensor]:
        rows = logits.shape[0]
        return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.int64)

    @torch.library.register_fake("infer::perturbed_max")
    def _(logits: Tensor, temperatures: Tensor, keys: Tensor, start: int) -> tuple[Tensor, Tensor]:
        return temperatures.new_empty(temperatures.shape), keys.new_empty(keys.shape)

    @torch.library.register_fake("infer::largest")
    def _(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        shape = (logits.shape[0], k)
        return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)

    @torch.library.register_fake("infer::rms_norm")
    def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("infer::add_rms_norm")
    def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.shape)

    @torch.library.register_fake("infer::act_and_mul")
    def _(x: Tensor, kind: str) -> Tensor:
        return x.new_empty((x.shape[0], x.shape[1] // 2))

    @torch.library.register_fake("infer::rotary_write_kv")
    def _(
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        k_pages: Tensor,
        v_pages: Tensor,
        slots: Tensor,
        num_q: int,
        num_kv: int,
    ) -> Tensor:
        return qkv.new_empty((qkv.shape[0], num_q, k_pages.shape[3]))

    @torch.library.register_fake("infer::paged_attention")
    def _(
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        kv_map: Tensor,
        scale: float,
        window: int,
        soft_cap: float,
    ) -> Tensor:
        return q.new_empty((*q.shape[:2], v_pages.shape[3]))

    @torch.library.register_fake("infer::rotary_write_latent")
    def _(
        q_latent: Tensor,
        q_rope: Tensor,
        kv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        norm: Tensor,
        eps: float,
        pages: Tensor,
        slots: Tensor,
    ) -> Tensor:
        return q_latent.new_empty((*q_latent.shape[:2], pages.shape[3]))

    @torch.library.register_fake("infer::packed_head_linear")
    def _(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
        return x.new_empty((*x.shape[:2], outputs))


def _register_cuda_fakes() -> None:
    @torch.library.register_fake("infer::attend_single_rows")
    def _(
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        kv_map: Tensor,
        scale: float,
        window: int,
        soft_cap: float,
        out: Tensor,
    ) -> None:
        return None
