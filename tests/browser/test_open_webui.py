"""A chat in Open WebUI, as `deploy/compose.yaml` sets it up; left out where Open WebUI or the browser is missing."""

import json
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from processes import REPO, run, start, wait_until
from serving_run import ServerProcess, make_run
from test_browser import browser_or_skip

from llm.parallel.launch import free_port

HERE = Path(__file__).parent
COMPOSE = yaml.safe_load((REPO / "deploy" / "compose.yaml").read_text())["services"]
OFFLINE = {"OFFLINE_MODE": "true", "HF_HUB_OFFLINE": "1", "RAG_EMBEDDING_ENGINE": "openai", "PYTHONPATH": ""}
APPLES = "Ava has 12 apples. She buys 7 more. How many?"


@pytest.mark.slow
def test_a_chat_in_open_webui(tmp_path):
    chromium = browser_or_skip()
    open_webui = os.environ.get("FATHOM_OPEN_WEBUI") or shutil.which("open-webui")
    if open_webui is None:
        pytest.skip("no open-webui (FATHOM_OPEN_WEBUI=file): see tests/browser/README.md")
    make_run(tmp_path / "runs")
    setting = next(one for one in COMPOSE["fathom"]["command"] if one.startswith("api.truncation="))
    with ServerProcess(tmp_path / "runs", "ui=api", "temperature=0", setting, stderr=None) as server:
        env = COMPOSE["open-webui"]["environment"] | OFFLINE | {"DATA_DIR": str(tmp_path), "WEBUI_SECRET_KEY": "x"}
        env |= {"WEBUI_AUTH": "False", "OPENAI_API_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "none"}
        port, log = free_port(), (tmp_path / "log").open("w")
        with log:
            started = start(
                open_webui, "serve", "--host=127.0.0.1", f"--port={port}", env=env, cwd=tmp_path, stdout=log, stderr=log
            )
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), started)
        page, screenshots = f"http://127.0.0.1:{port}", os.environ.get("FATHOM_SCREENSHOTS", str(tmp_path))
        greetings, sums = (
            run("node", str(HERE / "open_webui.mjs"), page, screenshots, chromium, *questions)
            for questions in (("Greet me.", "Again."), (APPLES,))
        )
    assert seen(greetings) == ["Grüße! 你好 😀", "Привет 👋"]
    (answer,) = seen(sums)
    assert "Ava has 12 + 7 = 19 apples." in answer and "Thought" in answer  # the calculation, folded


def seen(done) -> list[str]:
    """Answers that the page showed, also after a reload."""
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "failure" not in told and told["model"].strip() == "tiny/sft", told
    assert told["reloaded"] == told["answers"]
    return [one.strip() for one in told["answers"]]


def answers(url: str) -> bool:
    """True once a server answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
