"""The KV cache's device memory: how much there is, and the pages themselves."""

import logging
import math
import mmap
from dataclasses import dataclass

import numpy as np
import torch

from infer.cache.layout import KvLayout
from infer.config import EngineConfig

logger = logging.getLogger(__name__)

CPU_SHARE = 0.4  # of the host's available memory, divided by its ranks: weights, activations and others need the rest


@dataclass
class Pages:
    """k and v: one [num_blocks, block_size, heads, key_dim] tensor per local layer; v with value_dim likewise.

    Of a layout with values_in_keys, v is a view of k.
    """

    k: list[torch.Tensor]
    v: list[torch.Tensor]


def available_bytes(config: EngineConfig, device: torch.device, local_world_size: int, peak_bytes: int) -> int:
    """Bytes this rank may use for its KV cache. peak_bytes: what it takes beside weights and cache at most (GPU)."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        sharing = -(-local_world_size // torch.cuda.device_count())  # ranks on this GPU
        # What is in use now is that of all of them, the peak is this rank's own.
        return max(0, int(total * config.gpu_memory_utilization - (total - free)) // sharing - peak_bytes)
    return int(host_available_bytes() * CPU_SHARE) // local_world_size


def host_available_bytes() -> int:
    """What the host's kernel says can be had without swapping, or this process's cgroup allows if that is less."""
    available = 0
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    return max(0, min(available, _cgroup_room(available)))


def _cgroup_room(otherwise: int) -> int:
    """Bytes left to this process's cgroup (v2). Its page cache counts as free: the kernel gives that back."""
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            room = int(limit.read()) - int(used.read())
        with open("/sys/fs/cgroup/memory.stat") as lines:
            stat = dict(line.split() for line in lines)
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return otherwise
    return room + int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))


def check_fits(num_tokens: int, max_model_len: int, block_size: int, bytes_per_token: int, num_bytes: int) -> None:
    """Raises ValueError unless one request of max_model_len fits the cache.

    bytes_per_token and num_bytes are those of the rank with the least room.
    """
    if num_tokens >= max_model_len:
        return
    largest = num_tokens // block_size * block_size
    raise ValueError(
        f"one request of {max_model_len:,} tokens needs {max_model_len * bytes_per_token:,} bytes of KV cache, but "
        f"there are {num_bytes:,}; "
        + (f"--max-model-len {largest} fits" if largest > 1 else "not one block fits: give more memory")
        + " (see also --kv-cache-memory-bytes, --gpu-memory-utilization)"
    )


def allocate(
    num_blocks: int, block_size: int, layout: KvLayout, num_layers: int, dtype: torch.dtype, device: torch.device
) -> Pages:
    """Pages for every local layer. On a CPU memory is touched, and so really taken, only as blocks fill."""

    def page(dim: int) -> torch.Tensor:
        shape = (num_blocks, block_size, layout.heads, dim)
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        untouched = np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=np.uint8)[:size]
        return torch.from_numpy(untouched).view(dtype).view(shape)

    k = [page(layout.key_dim) for _ in range(num_layers)]
    if layout.values_in_keys:
        return Pages(k, [keys[..., : layout.value_dim] for keys in k])
    return Pages(k, [page(layout.value_dim) for _ in range(num_layers)])
