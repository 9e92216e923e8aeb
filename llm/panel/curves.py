"""Prepares a curve for a chart: another x axis, smoothing, fewer points that hide nothing, bands over seeds."""

from collections.abc import Sequence

import numpy as np

from llm.panel.columns import Columns, Points

AXES = ("step", "tokens", "flops", "seconds")
BUCKETS = 300  # of a chart's width; each keeps its lowest and its highest point
GRID = 300  # points of a band


def curve(columns: Columns, stage_dir: str, metric: str, axis: str = "step") -> Points:
    """Return a metric of a stage over an axis, (N,) each; empty where metric or axis were not recorded.

    Tokens, FLOPs and seconds at steps between two recorded ones are taken on the straight line between these, and those
    of step 0 are 0. Points beyond the recorded ones are left out.
    """
    steps, values = columns.points(stage_dir, metric)
    if axis == "step" or not len(steps):
        return steps, values
    at, amounts = columns.points(stage_dir, axis)
    fine = np.isfinite(amounts)
    at, amounts = at[fine], amounts[fine]
    if not len(at):
        return np.empty(0), np.empty(0)
    if at[0] > 0:
        at, amounts = np.append(0.0, at), np.append(0.0, amounts)
    known = steps <= at[-1]
    return np.interp(steps[known], at, amounts), values[known]


def smooth(values: np.ndarray, share: float) -> np.ndarray:
    """Return the exponential moving average (N,) in which the past has a weight of `share`, from 0 to below 1.

    It is divided by the sum of its weights, as Adam's moments are (Kingma and Ba 2015), so that the first values are
    not drawn to 0. Values that are NaN or infinite stay where they are, and the average goes on behind them.
    """
    if share <= 0 or not len(values):
        return values
    from scipy.signal import lfilter

    fine = np.isfinite(values)
    if not fine.any():
        return values
    weights = 1 - share ** np.arange(1, fine.sum() + 1)
    smoothed = values.copy()
    smoothed[fine] = lfilter([1 - share], [1, -share], values[fine]) / weights
    return smoothed


def fewer(x: np.ndarray, y: np.ndarray, buckets: int = BUCKETS) -> Points:
    """Return at most 3 points of each of `buckets` equal parts: lowest, highest, first that is NaN or infinite.

    So no peak is lost, however short. The first and the last point stay.
    """
    n = len(y)
    if n <= 2 * buckets:
        return x, y
    size = -(-n // buckets)
    padded = np.full(size * buckets, np.nan)
    padded[:n] = y
    table = padded.reshape(buckets, size)
    wrong = ~np.isfinite(table)
    starts = np.arange(buckets) * size
    lowest = np.where(wrong, np.inf, table).argmin(1) + starts
    highest = np.where(wrong, -np.inf, table).argmax(1) + starts
    broken = (wrong & (starts[:, None] + np.arange(size) < n)).argmax(1) + starts
    broken = broken[broken < n]
    chosen = np.unique(np.concatenate(([0, n - 1], lowest, highest, broken[~np.isfinite(y[broken])])))
    chosen = chosen[chosen < n]
    return x[chosen], y[chosen]


def band(curves: Sequence[Points], points: int = GRID) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (x, mean, lowest, highest), (points,) each, over curves where all of them are; empty where nowhere.

    Between recorded points a curve is taken to be straight; points that are NaN or infinite are left out.
    """
    cleaned = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves]
    nothing = np.empty(0)
    if not cleaned or not all(len(x) for x, _ in cleaned):
        return nothing, nothing, nothing, nothing
    low, high = max(x[0] for x, _ in cleaned), min(x[-1] for x, _ in cleaned)
    if low > high:
        return nothing, nothing, nothing, nothing
    grid = np.unique(np.concatenate([x for x, _ in cleaned]))
    grid = grid[(grid >= low) & (grid <= high)]
    if len(grid) > points:
        grid = np.linspace(low, high, points)
    table = np.stack([np.interp(grid, x, y) for x, y in cleaned])
    return grid, table.mean(0), table.min(0), table.max(0)
