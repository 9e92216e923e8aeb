"""Fits the scaling law to 11 trainings of depth 2 to 4, and predicts 4 larger ones that it has not seen.

python docs/guide/examples/15_laws.py [--leave-out 0] [--plot PATH]
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np

from llm.experiments.laws import Point, bootstrap, fit_law, fit_parabola, interval, predict

# depth, parameters of blocks and head, training tokens, training FLOPs, bits per byte: the lab notebook of 2026-11-29
FITTED = [
    (2, 917528, 3280896, 2e13, 1.6995),
    (3, 2113608, 1441792, 2e13, 1.7717),
    (4, 4194400, 737280, 2e13, 1.9374),
    (2, 917528, 6561792, 4e13, 1.6333),
    (3, 2113608, 2887680, 4e13, 1.6707),
    (4, 4194400, 1474560, 4e13, 1.7871),
    (2, 917528, 13123584, 8e13, 1.5903),
    (3, 2113608, 5771264, 8e13, 1.5733),
    (4, 4194400, 2949120, 8e13, 1.6328),
    (3, 2113608, 11542528, 1.6e14, 1.5072),
    (4, 4194400, 5898240, 1.6e14, 1.5268),
]
HELD_OUT = [
    (5, 7454900, 1658880, 8e13, 1.7459),
    (6, 12189912, 1028096, 8e13, 1.8575),
    (5, 7454900, 3321856, 1.6e14, 1.5956),
    (6, 12189912, 2056192, 1.6e14, 1.6561),
]


def point(row: tuple) -> Point:
    """Return a row of the tables as the fit takes it."""
    depth, params, tokens, flops, loss = row
    return Point(params, tokens, flops, loss, depth, flops)


parser = argparse.ArgumentParser()
parser.add_argument("--leave-out", type=int, help="number of a fitted run to leave out: how much hangs on one run?")
parser.add_argument("--plot", default="docs/guide/images/15_laws.png")
args = parser.parse_args()
points = [point(row) for i, row in enumerate(FITTED) if i != args.leave_out]

for flops in (4e13, 8e13):
    best = fit_parabola([p for p in points if p.flops == flops])
    if best is not None:
        print(f"{flops:g} FLOPs, best tokens in millions: {best.tokens / 1e6:.2f}")
law = fit_law(points)
laws = bootstrap(points, law)
low, high = interval([one.b for one in laws])
print(f"exponent of the tokens b: {law.b:.3f}\nits 95 % interval begins at: {low:.2f}\nand ends at: {high:.2f}")
errors = []
for row in HELD_OUT:
    guess = predict(points, law, laws, row[1], row[2])
    errors.append(100 * (guess.loss / row[4] - 1))
    print(f"d{row[0]} at {row[3]:g}, predicted: {guess.loss:.3f}")
    print(f"d{row[0]} at {row[3]:g}, error in percent: {errors[-1]:.2f}")
print(f"largest error in percent: {max(map(abs, errors)):.2f}")
print(f"the constant E: {law.E:.2f}")

for depth, colour in zip((2, 3, 4, 5, 6), plt.cm.viridis(np.linspace(0, 0.9, 5)), strict=True):
    runs = [row for row in FITTED + HELD_OUT if row[0] == depth]
    tokens = np.geomspace(5e5, 2e7, 50)
    marker = "o" if depth < 5 else "*"
    plt.plot([r[2] for r in runs], [r[4] for r in runs], marker, ms=9, color=colour, label=f"d{depth}")
    plt.plot(tokens, [law.at(runs[0][1], t) for t in tokens], "-" if depth < 5 else "--", color=colour, lw=1)
plt.xscale("log")
plt.gca().set(xlabel="training tokens", ylabel="bits per byte", title="lines: the law of d2 to d4; stars: held out")
plt.legend()
plt.gcf().set_size_inches(7, 4)
plt.tight_layout()
plt.savefig(args.plot, dpi=90)
