"""The tabs' functions as a browser would call them, the key, the guard, and one real server."""

import asyncio
import base64
import re
import signal
import sys
import urllib.request
from pathlib import Path

import gradio as gr
import pytest
from experiment_runs import add_run, add_sweep
from fastapi.testclient import TestClient
from gradio.state_holder import SessionState
from omegaconf import OmegaConf
from processes import REPO, start

from llm.cli.compose import compose
from llm.errors import UserError
from llm.panel.compare_tab import CompareTab
from llm.panel.evaluate_tab import EvaluateTab
from llm.panel.form import Form
from llm.panel.inside_tab import TEXT, InsideTab
from llm.panel.labels import Pair
from llm.panel.models import PanelModels
from llm.panel.page import build
from llm.panel.preferences_tab import PreferencesTab, Work
from llm.panel.runs_tab import NONE, RunsTab
from llm.panel.serve import build_app, check_access
from llm.panel.state import Panel
from llm.panel.train_tab import DEFAULT, GROUPS, ROWS, TrainTab

KEY = "a long secret"


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    add_sweep(root, "base", (1, 2))
    return Panel(root, root / "queue.sqlite", (root,))


@pytest.fixture(scope="module")
def tabs(panel):
    with gr.Blocks():
        return RunsTab(panel), CompareTab(panel, PanelModels(panel)), TrainTab(panel)


def gone(component):
    """Return what a page has of a component: of a list that names runs, jobs or tasks one that is gone."""
    if not isinstance(component, gr.Dropdown) or len(component.choices) > 1:
        return getattr(component, "value", None)
    name = 77 if component.elem_id == "panel-job" else "gone/pretrain"
    return [name] if component.multiselect else name


def test_a_chosen_run_that_is_gone_is_no_error_of_every_look(panel):
    """Also where the server began anew and the page did not: its lists are empty in the new session."""
    page, _ = build(panel)
    looks = [event for event in page.fns.values() if any(kind in ("tick", "select") for _, kind in event.targets)]
    looks = [event for event in looks if any(isinstance(one, gr.Dropdown) for one in event.inputs)]
    assert sum(kind == "tick" for event in looks for _, kind in event.targets) == 5
    for event in looks:
        asyncio.run(page.process_api(event, list(map(gone, event.inputs)), state=SessionState(page)))


def test_only_the_open_tab_is_watched(panel):
    page, _ = build(panel)
    timers = [block for block in page.blocks.values() if isinstance(block, gr.Timer)]
    assert [timer.active for timer in timers] == [True, False, False, False, False, True]
    tabs = [block for block in page.blocks.values() if isinstance(block, gr.Tab)]
    switched = {}
    for event in page.fns.values():
        for owner, kind in event.targets:
            if kind == "select" and event.outputs == timers:
                [label] = [tab.label for tab in tabs if tab._id == owner]
                switched[label] = [timer.active for timer in event.fn()]
    watching = ["Runs", "Train", "Data", "Evaluate", "Rollouts", "Runs"]  # its table, and the run that is open
    named = {label: [label == name for name in watching] for label in watching}
    assert switched == named | dict.fromkeys(("Compare", "Preferences", "Inside"), [False] * 6)
    assert {owner for event in page.fns.values() for owner, kind in event.targets if kind == "tick"} == {
        timer._id for timer in timers
    }


def test_the_table_opens_a_stage_and_the_timer_draws_it_again_only_when_it_changed(panel, tabs):
    runs, folder = tabs[0], add_run(panel.runs, "watched", until=40)
    table, said, names, others, _, states = runs.fill("", "all")
    assert runs.watch_table("", "all", states) == [gr.skip()] * 6
    add_run(panel.runs, "new", until=40)
    assert "new/pretrain" in runs.watch_table("", "all", states)[2]["choices"]
    assert len(table["value"]["data"]) == 3 and said == "" and "watched/pretrain" in names["choices"]
    assert others["choices"][0] == NONE and len(table["datatype"]) == len(table["value"]["headers"])
    assert "bpb&lt;x: &lt; needs a number" in runs.fill("bpb<x", "all")[1]
    shown, _, stamp, *_ = runs.show("watched/pretrain", NONE)
    assert "<polyline" in shown
    assert runs.watch("watched/pretrain", stamp) == [gr.skip()] * 2
    with (folder / "metrics.csv").open("a") as file:
        file.write("50,1.5,,\n")
    again, later = runs.watch("watched/pretrain", stamp)
    assert again != shown and later != stamp
    runs.write_note("watched/pretrain", "good", "a note")
    assert runs.show("watched/pretrain", None)[3:5] == ["good", "a note"]
    assert runs.show(None, None) == ["", "", (), "", "", ""]


def test_the_report_comes_without_pictures_and_from_runs_only(panel, tabs):
    folder = add_run(panel.runs, "told").parent
    assert "no report yet" in tabs[0].read_report("told/pretrain")
    (folder / "report.md").write_text("# Run\n\n![loss](report/loss.png)\n\ntext\n")
    assert tabs[0].read_report("told/pretrain") == "# Run\n\ntext\n"
    with pytest.raises(gr.Error, match="plain folder name"):
        tabs[0].read_report("../pretrain")


def test_compare_offers_the_metrics_of_the_chosen_stages(panel, tabs):
    compare = tabs[1]
    names = ["base-seed=1/pretrain", "base-seed=2/pretrain"]
    assert set(names) <= set(compare.choices()["choices"])
    assert compare.choose(names, ["loss", "gone"])["value"] == ["loss"]
    assert compare.choose(names, [])["value"] == ["bpb"]
    assert "<polygon" in compare.draw(names, ["bpb"], "step", 0.5, True)
    assert "Choose stages" in compare.draw([], [], "step", 0, False)
    assert "problem" in compare.decide("base", "none", "bpb", "")


def test_boxes_take_values_and_show_mistakes_beside_them(panel, tabs):
    train = tabs[2]
    options = ["tiny" if group == "experiment" else "sft" if group == "stage" else DEFAULT for group in GROUPS]
    form = train.choose(Form({}, {"seed": "7"}), *options)
    assert form == Form({"experiment": "tiny", "stage": "sft"}, {"seed": "7"})
    filled = train.fill(form, "max_steps", "main", False, 0)
    keys, boxes, wrong = filled[1], filled[7 : 7 + ROWS], filled[7 + ROWS :]
    place = keys.index("max_steps")
    assert boxes[place]["visible"] and "from 1" in boxes[place]["info"] and wrong == [""] * ROWS
    texts = ["7" if key == "seed" else "" for key in keys]
    texts[place] = " 0 "
    changed = train.put(form, keys, *texts, *[""] * (ROWS - len(keys)))
    assert form.values == {"seed": "7"} and changed.values == {"seed": "7", "max_steps": "0"}
    filled = train.fill(changed, "max_steps", "main", False, 0, keys)
    assert "value" not in filled[7]  # while somebody writes in another box
    assert train.fill(changed, "max_steps", "main", False, 0)[7 + place]["value"] == "0"
    assert "must be at least 1" in filled[7 + ROWS + filled[1].index("max_steps")]
    assert f"stage=sft seed=7 max_steps=0 paths.runs={panel.runs}" in filled[6]
    texts[place] = ""
    assert train.put(changed, keys, *texts).values == {"seed": "7"}
    later = train.fill(form, "", "all", False, 10_000)
    assert later[2] % ROWS == 0 and 0 < len(later[1]) <= ROWS and "of" in later[4]
    with pytest.raises(gr.Error, match="must be at least 1"):
        train.begin(changed, "", 1)
    assert "must be at least 1" in train.dry_run(changed)


def test_the_queue_is_sent_again_only_when_it_changed(panel, tabs):
    train = tabs[2]
    stamp = train.watch(None, ())[2]
    assert train.watch(None, stamp) == [gr.skip()] * 4
    with pytest.raises(gr.Error, match="choose a job"):
        train._acting("cancel")(None)


def settings(*words):
    cfg = compose("serve", ["ui=panel", *words])
    OmegaConf.resolve(cfg)
    return cfg


def test_others_need_a_key(monkeypatch):
    monkeypatch.delenv("FATHOM_API_KEY", raising=False)
    check_access(settings())
    for words in (["host=0.0.0.0"], ["public_names=[panel.example.org]"]):
        with pytest.raises(UserError, match="others could start trainings"):
            check_access(settings(*words))
        check_access(settings(*words, "api.access_key=secret"))
    with pytest.raises(UserError, match="blank"):
        check_access(settings("api.access_key='  '"))


def test_readonly_comes_from_the_configuration():
    assert not Panel.of(settings()).readonly
    assert Panel.of(settings("panel.readonly=true")).readonly


@pytest.fixture(scope="module")
def client(panel):
    app = build_app(panel, settings("host=0.0.0.0", f"api.access_key='{KEY}'"))
    with TestClient(app, base_url="http://panel.example.org") as client:
        yield client


def basic(password):
    return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


def test_the_key_opens_the_page_and_nothing_else_does(client):
    refused = client.get("/panel/")
    assert refused.status_code == 401 and refused.headers["WWW-Authenticate"].startswith("Basic")
    for headers in (basic("wrong"), basic(""), {"Authorization": "Basic !"}, {"Authorization": f"Bearer {KEY}"}):
        assert client.get("/panel/", headers=headers).status_code == 401
    assert client.get("/", headers=basic(KEY), follow_redirects=False).headers["location"] == "/panel/"
    page = client.get("/panel/", headers=basic(KEY))
    assert page.status_code == 200 and "Fathom: panel" in page.text
    assert client.get("/panel/config", headers=basic(KEY)).status_code == 200


def test_pages_of_other_sites_send_nothing_though_the_browser_adds_the_key(client):
    way = "/panel/gradio_api/queue/join"
    for more in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert client.post(way, json={}, headers=basic(KEY) | more).status_code == 403
    own = {"Origin": "http://panel.example.org", "Sec-Fetch-Site": "same-origin"}
    assert client.post(way, json={}, headers=basic(KEY) | own).status_code not in (401, 403)


@pytest.mark.parametrize(
    "path",
    [
        "/panel/gradio_api/file=/etc/passwd",
        "/panel/file=/etc/passwd",
        "/gradio_api/upload",
        "/panel/gradio_api/proxy=http://127.0.0.1",
        "/panel/v1/models",
        "/panel/metrics",
        "/panelx",
        "/docs",
    ],
)
def test_routes_that_the_page_does_not_need_are_closed(client, path):
    assert client.get(path, headers=basic(KEY)).status_code == 404


def test_files_are_taken_with_the_key_and_by_a_panel_that_may_change_something_only(panel, client):
    upload, files = "/panel/gradio_api/upload", {"files": ("a.txt", b"text")}
    assert client.post(upload, files=files).status_code == 401
    (sent,) = client.post(upload, files=files, headers=basic(KEY)).json()
    assert Path(sent).read_bytes() == b"text"
    Path(sent).unlink()
    fixed = Panel(panel.runs, panel.queue_file, panel.folders, readonly=True)
    with TestClient(build_app(fixed, compose("serve", ["ui=panel"])), base_url="http://127.0.0.1:7860") as shown:
        answer = shown.post(upload, files=files)
    assert (answer.status_code, "panel.readonly=true" in answer.text) == (403, True)


def test_the_page_is_sent_with_the_runs_of_now(tmp_path):
    add_run(tmp_path, "early")
    shown = Panel(tmp_path, tmp_path / "queue.sqlite", (tmp_path,))
    with TestClient(build_app(shown, compose("serve", ["ui=panel"])), base_url="http://127.0.0.1:7860") as client:
        before = client.get("/panel/").text
        add_run(tmp_path, "late")
        after = client.get("/panel/").text
    assert '"early/pretrain"' in before and '"late/pretrain"' not in before
    assert '"early/pretrain"' in after and '"late/pretrain"' in after
    assert "api_info_as_input" not in after


def test_a_panel_that_only_shows_offers_no_button_that_changes(panel):
    fixed, _ = build(Panel(panel.runs, panel.queue_file, panel.folders, readonly=True))
    hidden = set()

    def look(block, covered):
        covered = covered or block.visible is False
        if isinstance(block, gr.Button) and covered:
            hidden.add(block.value)
        for child in getattr(block, "children", ()):
            look(child, covered)

    look(fixed, False)
    assert {"Start", "Cancel", "Put away", "Delete for good", "Save", "Work on the queue"} <= hidden
    assert {"Draw pairs", "← Left is better", "Undo (U)", "Ask both", "Look inside"} <= hidden
    assert not {"Refresh", "Records after", "Questions after"} & hidden


def test_a_panel_that_only_shows_refuses_what_a_hidden_button_would_ask_for(panel):
    fixed = Panel(panel.runs, panel.queue_file, panel.folders, readonly=True)
    models, name = PanelModels(fixed), "base-seed=1/pretrain"
    with gr.Blocks():
        evaluate, preferences = EvaluateTab(fixed), PreferencesTab(models)
        inside, compare = InsideTab(models), CompareTab(fixed, models)
    pair = Work((Pair("q", "a", "b", name, name),))
    for act in (
        lambda: evaluate.begin([name], ["bpb"], *[""] * len(evaluate.boxes)),
        lambda: preferences.decide(pair, "left", "mine", None),
        lambda: preferences.take_back(pair, "mine", None),
    ):
        with pytest.raises(gr.Error, match="panel.readonly=true"):
            act()
    for said in (
        preferences.begin(name, name, "q", "typed above", 1.0, 8, 1)[1],
        inside.begin(name, TEXT, "x")[1],
        compare.answer(name, name, "q", 0.0, 8, 1),
    ):
        assert "panel.readonly=true" in said
    assert not (panel.folders[-1] / "votes").exists() and not any(
        job.script == "evaluate" for job in fixed.queue.jobs()
    )


def test_the_chat_beside_the_panel_is_a_link_away(panel):
    def texts(made):
        return [str(block["props"].get("value")) for block in made.get_config_file()["components"]]

    beside = Panel(panel.runs, panel.queue_file, panel.folders, chat=True)
    assert any("[Chat with the model that is served](/)" in one for one in texts(build(beside)[0]))
    assert not any("[Chat" in one for one in texts(build(panel)[0]))
    assert Panel.of(compose("serve", ["ui=panel", "run=demo"])).chat
    assert not Panel.of(compose("serve", ["ui=panel"])).chat


@pytest.mark.slow
def test_a_real_server_shows_the_panel_and_ends_tidily(panel, tmp_path):
    words = (sys.executable, str(REPO / "serve.py"), "ui=panel", "port=0", f"paths.runs={panel.runs}")
    server, said = start(*words, cwd=tmp_path), ""
    while "panel at" not in said:
        line = server.stdout.readline()
        assert line, said
        said += line
    address = re.search(r"http://\S+/panel", said)[0]
    with urllib.request.urlopen(f"{address}/") as answer:
        assert b"Fathom: panel" in answer.read()
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
