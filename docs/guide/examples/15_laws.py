"""Fits the scaling law to 11 trainings of depth 2 to 4, and predicts 4 larger ones that it has not seen.

python docs/guide/examples/15_laws.py [--leave-out 0] [--plot PATH]
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np

from llm.experiments.laws import Coupled, Point, Surface, bootstrap, choose_law, fit_parabola, interval, predict

# depth, parameters of blocks and head, training tokens, training FLOPs, bits per byte (means of two seeds): the lab
# notebook of 2026-11-29
FITTED = [
    (2, 917528, 3280896, 2e13, 1.69866),
    (3, 2113608, 1441792, 2e13, 1.78218),
    (4, 4194400, 737280, 2e13, 1.93639),
    (2, 917528, 6561792, 4e13, 1.63408),
    (3, 2113608, 2887680, 4e13, 1.66667),
    (4, 4194400, 1474560, 4e13, 1.78480),
    (2, 917528, 13123584, 8e13, 1.58999),
    (3, 2113608, 5771264, 8e13, 1.57184),
    (4, 4194400, 2949120, 8e13, 1.63332),
    (3, 2113608, 11542528, 1.6e14, 1.50796),
    (4, 4194400, 5898240, 1.6e14, 1.52747),
]
HELD_OUT = [
    (5, 7454900, 1658880, 8e13, 1.74592),
    (6, 12189912, 1028096, 8e13, 1.84967),
    (5, 7454900, 3321856, 1.6e14, 1.58952),
    (6, 12189912, 2056192, 1.6e14, 1.66805),
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
law, left_out = choose_law(points)
for name, form in (("added", Surface), ("coupled", Coupled)):
    print(f"{name}, error at runs left out in percent: {100 * left_out[form]:.2f}")
laws = bootstrap(points, law)
low, high = interval([one.b for one in laws])
print(f"exponent of the tokens b: {law.b:.3f}\nits 95 % interval begins at: {low:.3f}\nand ends at: {high:.3f}")
errors = []
for row in HELD_OUT:
    guess = predict(points, law, laws, row[1], row[2])
    errors.append(100 * (guess.loss / row[4] - 1))
    print(f"d{row[0]} at {row[3]:g}, predicted: {guess.loss:.3f}")
    print(f"d{row[0]} at {row[3]:g}, error in percent: {errors[-1]:.2f}")
print(f"largest error in percent: {max(map(abs, errors)):.2f}")

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
