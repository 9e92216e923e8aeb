"""The best bits per byte of a stage against its last, in words."""

from collections.abc import Iterable
from typing import Any

RISE = 0.005  # bits per byte above the best that are more than noise


def best_line(rows: Iterable[dict[str, float]], weights: dict[str, Any] | None = None) -> str | None:
    """Return a line such as "bpb: best 2.062 at 300, last 2.105: overfitting"; None where bpb was not measured.

    rows: those of metrics.csv. weights: what run.json says of the weights handed over, {"step": ...}; named if given.
    """
    measured = [(row["bpb"], int(row["step"])) for row in rows if "bpb" in row]
    if not measured:
        return None
    (best, step), last = min(measured), measured[-1][0]
    line = f"bpb: best {best:.3f} at {step}, last {last:.3f}" + (": overfitting" if last > best + RISE else "")
    return line + (f"; handed over: the weights of step {weights['step']}" if weights else "")
