"""Cost of a stage: its wall-clock on all its devices, at `device_price`."""

import math
from collections.abc import Mapping
from typing import Any


def device_hours(manifest: Mapping[str, Any]) -> float | None:
    """Return the hours of all devices that a stage has used, by its run.json; None where that is not known.

    An older release did not count devices: there it is the wall-clock on `trainer.devices`, where that is a number.
    """
    seconds, trainer = manifest.get("seconds"), (manifest.get("config") or {}).get("trainer") or {}
    if manifest.get("device_seconds") is not None:
        return manifest["device_seconds"] / 3600
    devices = trainer.get("devices")
    if devices == "auto" and not ((manifest.get("environment") or {}).get("gpus") or trainer.get("num_nodes") != 1):
        devices = 1  # one process computes on a CPU
    counts = [devices, trainer.get("num_nodes", 1)]
    if not seconds or not all(str(count).isdigit() for count in counts):
        return None
    return seconds * math.prod(map(int, counts)) / 3600


def cost(manifest: Mapping[str, Any]) -> float | None:
    """Return what a stage has cost in dollars, by its run.json; None without `device_price`, or without a duration."""
    price, hours = (manifest.get("config") or {}).get("device_price"), device_hours(manifest)
    return None if price is None or hours is None else price * hours
