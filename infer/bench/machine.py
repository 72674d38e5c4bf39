"""What this machine can do, measured on the spot in some hundred milliseconds: memory reads and matrix products."""

import os
import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from infer.bench.limits import Hardware
from infer.cache.pages import host_available_bytes
from infer.launch import RankEnv

SECONDS = 0.15  # of each measurement, about
CPU_BUFFER_BYTES = 256 << 20  # more than a cache holds
CUDA_BUFFER_BYTES = 1 << 30
MAX_MATRIX = {"cpu": 2048, "cuda": 8192}
CALLS_IN_A_ROW = {"cpu": 1, "cuda": 10}  # so that launching and waiting for a GPU does not count


def measure(device: torch.device, dtype: torch.dtype, env: RankEnv) -> Hardware:
    """What the devices of all ranks can do together: rank 0 measures its own host or GPU, and the others are like it.

    On a CPU it takes as many threads as the ranks of this host have together, which must be idle meanwhile.
    """
    num_hosts = env.world_size // env.local_world_size
    if device.type == "cuda":
        count = num_hosts * min(env.local_world_size, torch.cuda.device_count())
        name = torch.cuda.get_device_name(device)
        bandwidth, rate = _read_bandwidth(device), _matrix_rate(device, dtype)
        words = f"{count} x {name}"
    else:
        before = torch.get_num_threads()
        threads = min(before * env.local_world_size, num_cores())
        name, count = cpu_name(), num_hosts
        torch.set_num_threads(threads)
        try:
            bandwidth, rate = _read_bandwidth(device), _matrix_rate(device, dtype)
        finally:
            torch.set_num_threads(before)
        hosts = f"{num_hosts} x " if num_hosts > 1 else ""
        words = f"{hosts}{name}, {threads} thread{'s' if threads > 1 else ''}"
    return Hardware(name, words, str(dtype).removeprefix("torch."), count * bandwidth, count * rate)


def _read_bandwidth(device: torch.device) -> float:
    """Bytes per second of the faster of two ways to read a large buffer."""
    if device.type == "cuda":
        num_bytes = min(CUDA_BUFFER_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    else:
        num_bytes = min(CPU_BUFFER_BYTES, host_available_bytes() // 8)
    columns = 4096
    rows = max(1, num_bytes // (4 * columns))
    matrix = torch.ones(rows, columns, device=device)
    vector, flat = torch.ones(columns, device=device), matrix.view(-1)
    seconds = min(_best(lambda: torch.mv(matrix, vector), device), _best(lambda: torch.dot(flat, flat), device))
    return matrix.nbytes / seconds


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of matrix products of this dtype.

    On a CPU without instructions for it, products in float32 are faster, and a kernel is free to convert.
    """
    rate = _product_rate(device, dtype)
    return rate if device.type == "cuda" or dtype == torch.float32 else max(rate, _product_rate(device, torch.float32))


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of square products, growing until one takes long enough."""
    best, size, seconds = 0.0, 256, 0.0
    while size <= MAX_MATRIX[device.type] and seconds < SECONDS / 4:
        # Random, for a GPU's clock falls with the power it draws, which equal numbers spare it.
        x, weight = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _best(lambda x=x, weight=weight: F.linear(x, weight), device)  # type: ignore[misc]
        best, size = max(best, 2 * size**3 / seconds), 2 * size
    return best


@torch.inference_mode()
def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of the calls that fit in SECONDS; at least two, the first of which does not count."""
    in_a_row = CALLS_IN_A_ROW[device.type]
    work()
    _synchronize(device)
    best, begun = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begun < SECONDS:
        started = time.perf_counter()
        for _ in range(in_a_row):
            work()
        _synchronize(device)
        best = min(best, (time.perf_counter() - started) / in_a_row)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def num_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name as its maker gives it, or its architecture."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return " ".join(line.partition(":")[2].replace("(R)", "").replace("(TM)", "").split())
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
