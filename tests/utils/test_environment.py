"""Settings of the process that speed depends on."""

import json
import os
import sys

import pytest
from processes import run

from llm.utils.environment import PRIVATE

SCRIPT = """
import json, os, resource
from llm.utils.environment import tune_process
tune_process()
bytearray(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    bytearray(b"x" * (8 << 20))
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"faults": faults, "spin": os.environ.get("GOMP_SPINCOUNT")}))
"""


def tuned(**env: str) -> dict:
    settings = [name for name in os.environ if name.startswith(("MALLOC_", "GOMP_", "OMP_"))]
    unset = [arg for name in ("OMP_NUM_THREADS", *settings) for arg in ("-u", name)]
    values = [f"{name}={value}" for name, value in env.items()]
    return json.loads(run("env", *unset, *values, sys.executable, "-c", SCRIPT).stdout)


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="glibc"
)
def test_freed_memory_stays_with_the_process():
    pages = 50 * (8 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert tuned()["faults"] < 0.2 * pages
    assert tuned(MALLOC_ARENA_MAX="1")["faults"] > 0.8 * pages  # the user's own settings of malloc are left alone


def test_threads_spin_for_a_while_unless_the_user_says_otherwise():
    assert tuned()["spin"] == "4000"
    assert tuned(GOMP_SPINCOUNT="7")["spin"] == "7"
    assert tuned(OMP_WAIT_POLICY="ACTIVE")["spin"] is None


PRIVACY = """
import sys
sys.argv[1:] = ["--help"]
from llm.cli.app import run_app
assert "huggingface_hub" not in sys.modules  # which reads its variables when it is imported
try:
    run_app("serve", "never.imported")
except SystemExit:
    pass
import datasets.config, huggingface_hub.constants
hub, data = huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
print("\\n", hub, data)
"""


def test_the_commands_start_with_telemetry_off():
    unset = [arg for name in PRIVATE for arg in ("-u", name)]
    for env, expected in (([], "True False"), (["HF_HUB_DISABLE_TELEMETRY=0", "DO_NOT_TRACK=0"], "False False")):
        assert run("env", *unset, *env, sys.executable, "-c", PRIVACY).stdout.split("\n ")[-1].strip() == expected


def test_libraries_know_the_variables_that_keep_them_quiet(monkeypatch):
    """Each of these functions reads its variable when it is called."""
    for name in PRIVATE:
        monkeypatch.delenv(name, raising=False)
    analytics = pytest.importorskip("gradio.analytics")
    wandb = pytest.importorskip("wandb.env")
    assert analytics.analytics_enabled() and wandb.error_reporting_enabled()
    for name, value in PRIVATE.items():
        monkeypatch.setenv(name, value)
    assert not analytics.analytics_enabled() and not wandb.error_reporting_enabled()
