"""bench/rl.py: the standard errors of its table."""

import sys

import pytest
from conftest import REPO

sys.path.append(str(REPO / "bench"))
import rl  # noqa: E402


def test_every_pass_rate_has_a_standard_error_of_its_own():
    """Tell pass@k from pass@1: of an item the first, with all its k answers, is 0 or 1, the second a share."""
    own = {"accuracy": 0.5, "n": 100, "stderr": 0.02, "pass@1": 0.5, f"pass@{rl.SAMPLES}": 0.9}
    assert list(rl.scores_of({rl.GAINED: own, "metrics": {}})) == [
        ("pass@1", 50.0, 2.0),
        (f"pass@{rl.SAMPLES}", 90.0, pytest.approx(3.0)),
    ]
