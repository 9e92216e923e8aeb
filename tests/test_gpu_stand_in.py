"""Steps on a GPU that does nothing: devices, formats and strides fit, and the host waits nowhere."""

import json
import shutil
import sys

import pytest
from conftest import REPO
from processes import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="no g++"),
]


def test_no_case_fails_and_none_waits_for_the_device(tmp_path):
    done = run(sys.executable, str(REPO / "tests/gpu_stand_in.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 22 and not any(found.values()), {name: said for name, said in found.items() if said}
