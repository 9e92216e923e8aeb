"""What torch's profiler saw: waits of the host, copies between host and device, launches, how busy the device was."""

import _bench  # isort: skip  (puts the project on the path)
import time
from collections import Counter, defaultdict

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")  # aten::item waits by the first
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")


class traced:
    """A context whose `summary()` counts what happened within it. Leaving it waits for the device once, uncounted."""

    def __enter__(self) -> "traced":
        _bench.sync()
        self.profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        self.profile.__enter__()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *exc) -> None:
        _bench.sync()
        self.seconds = time.perf_counter() - self.start
        self.profile.__exit__(*exc)

    def summary(self, top: int = 8) -> dict:
        """Numbers by name; on a CPU the number of waits of `aten::item` only."""
        counts, waited, spans, kernels = Counter(), 0.0, [], defaultdict(float)
        for event in self.profile.profiler.kineto_results.events():
            name, us = event.name(), event.duration_ns() / 1000
            if event.device_type() == DeviceType.CUDA:
                spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
                kernels[name] += us / 1000
                continue
            counts[name] += 1
            waited += us / 1000 if name in WAITS else 0.0
        result = {"items_read": counts["aten::_local_scalar_dense"]}
        if not spans:
            return result
        copies = sum(n for name, n in counts.items() if name == "cudaMemcpyAsync")
        result |= {"host_waits": sum(counts[name] for name in WAITS) - 1, "host_waits_ms": waited, "copies": copies}
        result |= {"launches": sum(counts[name] for name in LAUNCHES), "traced_ms": 1000 * self.seconds}
        result |= {"busy": covered(spans) / 1e9 / self.seconds}
        longest = sorted(kernels.items(), key=lambda item: -item[1])[:top]
        return result | {f"kernel_{i}": f"{ms:.2f} ms {name[:90]}" for i, (name, ms) in enumerate(longest, 1)}


def covered(spans: list[tuple[int, int]]) -> int:
    """Length of the union of intervals."""
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def memory_gib() -> float:
    """Most memory in use so far on the GPU."""
    return torch.cuda.max_memory_allocated() / 2**30
