"""Adapters that are served beside their base: which ones are found, what is refused, and how requests choose."""

import asyncio
import json
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_run import ServerProcess, make_adapter, make_run

import llm
from llm.errors import UserError
from llm.inference.sampling import SamplingParams
from llm.serving.adapters import chosen_adapters, load_adapters
from llm.serving.chat import load_chat_model
from llm.serving.models import Models

BIRD, TREE = "I am a bird.", "I am an apple."
ME = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Runs: tiny/sft, two adapters of it, and one of another base. None has learnt what it was shown."""
    root = tmp_path_factory.mktemp("runs")
    base, other = make_run(root, steps=2), make_run(root, "other", steps=1)
    make_adapter(base, "bird", BIRD, steps=10)
    make_adapter(base, "tree", TREE, rank=2, steps=10)
    make_adapter(other, "stray", "Who knows?", steps=1)
    return root


@pytest.fixture
def runs(trained, tmp_path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(trained, tmp_path / "runs")


def base_of(runs: Path) -> str:
    return str(runs / "tiny/sft")


def chosen(runs: Path, given=None, **more) -> dict[str, str]:
    return chosen_adapters(given, runs, base_of(runs), **more)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---------------------------------------------------------------------------------------------------------------------
# Which adapters


def test_those_of_the_served_base_are_found_where_other_stages_are_offered(trained, capsys):
    found = chosen(trained, offers_all=True)
    assert found == {f"{run}/sft": str(trained / run / "sft/model") for run in ("bird", "tree")}
    assert chosen(trained) == chosen(trained, [], offers_all=True) == {}
    assert chosen_adapters(None, trained, "hf:any/model", offers_all=True) == {}
    assert not capsys.readouterr().err


def test_a_damaged_one_that_was_not_asked_for_is_left_out_with_a_line(runs, capsys):
    change(runs / "bird/sft/model/adapter.json", rank=5)
    assert list(chosen(runs, offers_all=True)) == ["tree/sft"]
    line = capsys.readouterr().err
    assert line.startswith("note: bird/sft is not served as an adapter (") and line.count("\n") == 1


@pytest.mark.parametrize("place", ["bird/sft", "{runs}/bird/sft", "{runs}/bird/sft/model"])
def test_run_and_stage_or_a_folder_names_an_adapter(trained, place):
    assert chosen(trained, [place.format(runs=trained)]) == {"bird/sft": str(trained / "bird/sft/model")}


def test_the_two_files_are_enough(trained, tmp_path):
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in ("adapter.json", "adapter.safetensors"):
        shutil.copy(trained / "bird/sft/model" / name, folder)
    assert chosen(trained, [str(folder)]) == {"copied": str(folder)}


def refused(runs: Path, match: str, *given: str, verify: bool = True) -> None:
    with pytest.raises(UserError, match=match) as error:
        chosen(runs, given, verify=verify)
    assert "\n" not in str(error.value)


def test_what_is_no_adapter_of_the_base_is_refused(runs):
    refused(runs, "adapters: nowhere has no adapter.json .* a stage trained with model.lora.rank", "nowhere")
    refused(runs, "adapters: tiny/sft has no adapter.json", "tiny/sft")
    refused(
        runs, "adapters: stray/sft belongs to weights .* serve its base, .*other/sft/model", "tree/sft", "stray/sft"
    )
    change(runs / "bird/sft/run.json", status="running")
    refused(runs, "stage=sft of run=bird is not finished", "bird/sft")
    shutil.copytree(runs / "bird/sft/model", runs / "a/b")
    shutil.copytree(runs / "tree/sft/model", runs / "c/b")
    refused(runs, "are both called b; rename a folder", str(runs / "a/b"), str(runs / "c/b"))
    with pytest.raises(UserError, match="adapters with model=hf:any: their base must be a run of yours"):
        chosen_adapters(["tree/sft"], runs, "hf:any")


def test_files_that_do_not_belong_together_are_refused(runs):
    folder = runs / "tree/sft/model"
    files = {name: (folder / name).read_bytes() for name in ("adapter.json", "adapter.safetensors")}
    change(folder / "adapter.json", rank=3)
    refused(runs, r"adapter.json has \d+ bytes|adapter.json is not what was written", "tree/sft")
    needed = r"has the shape \(2, 64\), but rank 3 beside this base needs \(3, 64\); copy"
    refused(runs, needed, "tree/sft", verify=False)
    (folder / "adapter.json").write_bytes(files["adapter.json"])
    tensors = load_file(folder / "adapter.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "adapter.safetensors")
    refused(runs, "its tensors are not those that adapter.json describes", "tree/sft", verify=False)
    (folder / "adapter.safetensors").write_bytes(files["adapter.safetensors"][:-4])
    refused(runs, "adapter.safetensors: cannot be read", "tree/sft", verify=False)
    (folder / "adapter.safetensors").unlink()
    refused(runs, "adapter.safetensors is missing", "tree/sft")
    (folder / "manifest.json").unlink()
    refused(runs, "adapter.safetensors: cannot be read .no such file", "tree/sft")


def test_a_stage_with_another_shape_is_refused(runs):
    config = json.loads((runs / "bird/sft/model/config.json").read_text())
    config["fathom"]["model"]["seq_len"] = 999
    (runs / "bird/sft/model/config.json").write_text(json.dumps(config))
    refused(
        runs,
        "bird/sft was trained with seq_len=999, but its base is served with 768; serve it by its merged weights",
        "bird/sft",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Who answers


def said(model) -> str:
    replies = list(model.answer(ME, SamplingParams(0.0, max_new_tokens=20)))
    return "".join(part["text"] for part in replies[-1].content)


def test_a_chat_switches_between_base_and_adapters_of_one_engine(trained):
    first = load_chat_model(base_of(trained), compute="fp32", adapters=chosen(trained, offers_all=True))
    models = Models(first)
    assert models.names() == ["tiny/sft", "bird/sft", "tree/sft"]
    for name in models.names():
        assert said(models.get(name)) == said(load_chat_model(trained / name, compute="fp32"))
    assert models.get("bird/sft").engine is first.engine
    assert "adapter of rank 2" in models.get("tree/sft").summary


def test_adapters_answer_as_their_merged_weights_do(trained):
    """In fp32, token by token."""
    adapters = load_adapters(base_of(trained), chosen(trained, offers_all=True))
    base = load_chat_model(base_of(trained), compute="fp32", adapters=chosen(trained, offers_all=True))
    prompt, params = base.engine.tokenizer.encode_prompt("Who"), SamplingParams(0.0, max_new_tokens=60, logprobs=0)
    for name in adapters:
        merged = load_chat_model(trained / name, compute="fp32").engine.generate([prompt], params)[0][0]
        found = base.engine.generate([prompt], params, adapter=name)[0][0]
        assert found.ids == merged.ids
        torch.testing.assert_close(torch.tensor(found.logprobs), torch.tensor(merged.logprobs), atol=1e-4, rtol=0)


def test_a_notebook_loads_adapters_beside_a_model(trained):
    model = llm.load(trained / "tiny", adapters=["bird/sft"])
    settings, names = {"temperature": 0, "max_new_tokens": 20}, (None, "bird/sft")
    answers = {model.chat("Who are you?", adapter=name, **settings) for name in names}
    assert len(answers) == 2
    assert {"".join(model.chat("Who are you?", stream=True, adapter=name, **settings)) for name in names} == answers
    texts = {model.generate("The", adapter=name, **settings) for name in names}
    assert len(texts) == 2
    assert {"".join(model.generate("The", stream=True, adapter=name, **settings)) for name in names} == texts
    assert model.score("Who", BIRD, adapter="bird/sft") != model.score("Who", BIRD)
    for name in names:
        inside = model.look_inside("Who are you?", adapter=name)
        seen, coming = inside.logits[:-1].log_softmax(-1), torch.tensor(inside.ids[1:])
        expected = model.engine.score(inside.ids[:1], inside.ids[1:], name)
        torch.testing.assert_close(seen.gather(1, coming[:, None])[:, 0], torch.tensor(expected), atol=0.1, rtol=0.05)
    with pytest.raises(UserError, match="adapter=tree/sft"):
        model.look_inside("Who", adapter="tree/sft")
    with pytest.raises(UserError, match="adapter=tree/sft: the engine has no adapter of this name; there is bird/sft"):
        model.chat("Who are you?", adapter="tree/sft")
    with pytest.raises(UserError, match="adapters: stray/sft belongs to weights"):
        llm.load(trained / "tiny", adapters=["stray/sft"])


# ---------------------------------------------------------------------------------------------------------------------
# The API


def test_requests_name_the_base_or_an_adapter():
    pytest.importorskip("fastapi")
    from scripted_pool import BODY, FACTS, scripted, served

    pool = scripted([*b"ok"])
    beside = [{"name": "c/d", "summary": "an adapter", "notes": (), "examples": ()}]
    pool.facts = FACTS | {"beside": beside}
    app = served(pool)

    async def ask(method: str, path: str, body: dict | None = None) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:1") as client:
            return await client.request(method, path, json=body)

    def run(*request) -> httpx.Response:
        return asyncio.run(ask(*request))

    listed = run("GET", "/v1/models").json()["data"]
    assert [(one["id"], one["description"], one.get("parent")) for one in listed] == [
        ("a/b", "a model", None),
        ("c/d", "an adapter", "a/b"),
    ]
    assert run("GET", "/v1/models/c/d").json() == listed[1]
    for path, asked in {
        "/v1/chat/completions": BODY,
        "/v1/completions": {"prompt": "Hi"},
        "/v1/responses": {"input": "Hi"},
    }.items():
        for name, adapter in (("a/b", None), ("c/d", "c/d")):
            assert run("POST", path, asked | {"model": name}).json()["model"] == name
            assert pool.workers[0].writer.heard[-1][2]["adapter"] == adapter
    refusal = run("POST", "/v1/completions", {"model": "e/f", "prompt": "Hi"})
    assert refusal.status_code == 404 and "there is 'a/b', 'c/d'" in refusal.json()["error"]["message"]
    names = app.openapi()["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"]
    assert names == ["a/b", "c/d"]


@pytest.mark.slow
def test_one_server_answers_by_several_adapters_at_once(tmp_path):
    """The real client chooses by `model`; the page's other models are those adapters, without a worker of their own."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("gradio")

    async def ask(url: str) -> dict[str, set[str]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
            names = [one.id for one in (await client.models.list()).data] * 4
            kinds = [client.chat.completions.create(model=name, messages=ME) for name in names]
            texts = [answer.choices[0].message.content for answer in await asyncio.gather(*kinds)]
        found: dict[str, set[str]] = {}
        for name, text in zip(names, texts, strict=True):
            found.setdefault(name, set()).add(text)
        return found

    base = make_run(tmp_path)
    make_adapter(base, "bird", BIRD)
    make_adapter(base, "tree", TREE, rank=2, steps=120)
    with ServerProcess(tmp_path, "temperature=0", "api.log=none", "compute=fp32") as server:
        found = asyncio.run(ask(server.url))
        stats = httpx.get(f"{server.url}/stats", timeout=600).json()
    (own,) = found.pop("tiny/sft")
    assert own.startswith("I am Fathom") and found == {"bird/sft": {BIRD}, "tree/sft": {TREE}}
    assert stats["total_workers"] == 1
    assert "adapters in the same engine, as models: bird/sft, tree/sft" in server.output
