"""Counts from torch's profiler: waits of the host, copies between host and device, launches, how busy the device is."""

import _bench  # isort: skip  (puts the project on the path)
import time
from collections import Counter, defaultdict

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")  # aten::item waits by the first
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
END = "gpu_check: end of what is traced"


class traced:
    """Context whose `summary()` counts the events within it, without the wait for the device that ends it."""

    def __enter__(self) -> "traced":
        _bench.sync()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (_bench.DEVICE.type == "cuda")
        self.profile = profile(activities=activities)
        self.profile.__enter__()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *exc) -> None:
        with record_function(END):
            _bench.sync()
        self.seconds = time.perf_counter() - self.start
        self.profile.__exit__(*exc)

    def summary(self, top: int = 8) -> dict:
        """Return numbers by name; on a CPU only `items_read`, the number of values read by `item()`.

        `host_waits_ms` and `traced_ms` are milliseconds, `busy` is the device's busy share of the time, `kernel_1` to
        `kernel_<top>` are the kernels that took longest.
        """
        counts, waited, spans, kernels = Counter(), 0.0, [], defaultdict(float)
        events = self.profile.profiler.kineto_results.events()
        end = min(event.start_ns() for event in events if event.name() == END)
        for event in events:
            name, ms = event.name(), event.duration_ns() / 1e6
            if event.is_user_annotation() or name == END:  # spans of many kernels
                continue
            if event.device_type() == DeviceType.CUDA:
                spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
                kernels[name] += ms
            elif event.start_ns() < end:
                counts[name] += 1
                waited += ms if name in WAITS else 0.0
        result = {"items_read": counts["aten::_local_scalar_dense"]}
        if not spans:
            return result
        copies = sum(n for name, n in counts.items() if name == "cudaMemcpyAsync")
        result |= {"host_waits": sum(counts[name] for name in WAITS), "host_waits_ms": waited, "copies": copies}
        result |= {"launches": sum(counts[name] for name in LAUNCHES), "traced_ms": 1000 * self.seconds}
        result |= {"busy": covered(spans) / 1e9 / self.seconds}
        longest = sorted(kernels.items(), key=lambda item: -item[1])[:top]
        return result | {f"kernel_{i}": f"{ms:.2f} ms {name[:90]}" for i, (name, ms) in enumerate(longest, 1)}


def covered(spans: list[tuple[int, int]]) -> int:
    """Return the length of the union of intervals (start, stop)."""
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def memory_gib() -> float:
    """Return the most memory in use so far on the GPU, in GiB."""
    return torch.cuda.max_memory_allocated() / 2**30
