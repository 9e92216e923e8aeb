"""What a saved run names is fetched only where the command names it again, Fathom does, or it was fetched before."""

import contextlib
import json
import time

import pytest
from conftest import compose
from omegaconf import OmegaConf

from llm.config import trust
from llm.config.trust import check_trusted, is_trusted
from llm.errors import UserError
from llm.eval.saved import saved_config
from llm.utils.addresses import public, without_secrets

HUB_TASK = {"type": "chat", "source": "hub", "repo": "evil/rows", "train": "train", "test": "test"}
WEB_TASK = {"type": "chat", "source": "local", "train": "https://evil.example/rows.jsonl?key=S3CRET"}
TEXTS = (
    {"name": "hub", "repo": "evil/text"},
    {"name": "local", "path": "s3://evil/text"},
    {"name": "local", "train": ["a.txt", "hf://datasets/evil/text/b.txt"]},
    {"name": "mixture", "sources": {"a": {"repo": "evil/text"}}},
    {"name": "hub", "repo": "../../evil"},
    {"tasks": {"rows": HUB_TASK}},
    {"tasks": {"rows": WEB_TASK}},
)


@pytest.fixture(autouse=True)
def nobody_is_trusted(monkeypatch):
    monkeypatch.setattr(trust, "_trusted", set())


@pytest.fixture
def stage_with(tmp_path):
    """Return a function that writes a stage whose run.json has this data."""

    def write(data, *overrides):
        config = OmegaConf.to_container(compose("train", "experiment=tiny", "stage=sft", *overrides), resolve=True)
        config["data"] |= data
        (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "config": config}))
        return tmp_path

    return write


@pytest.mark.parametrize("data", TEXTS)
def test_what_a_saved_run_names_is_refused_with_the_way_out(stage_with, data):
    with pytest.raises(UserError, match=r"run.json: config.data.*a saved run fetches nothing.*trust=\[") as refused:
        saved_config(stage_with(data), "cache")
    assert "S3CRET" not in str(refused.value)
    assert saved_config(stage_with(data), None)["data"]  # nothing of the data is read: no question


@pytest.mark.parametrize("data", TEXTS)
def test_what_the_command_names_is_trusted(stage_with, data):
    trust.trust(["evil", "s3://evil", "hf://datasets/evil/text", "https://evil.example/rows.jsonl", "../../evil"])
    saved = saved_config(stage_with(data), "cache")["data"]
    assert {key: saved[key] for key in data} == data


@pytest.mark.parametrize("option", ["fineweb_edu", "climbmix", "embedded"])
def test_our_own_presets_need_no_trust(stage_with, option):
    assert saved_config(stage_with({}, f"data={option}"), "cache")["data"]["name"]


@pytest.mark.slow
def test_what_was_fetched_before_needs_no_trust(stage_with, tmp_path):
    files = ["evil--text/main/files.json", "tasks/evil--rows/main/default/fathom.json"]
    for name in files:
        (tmp_path / "cache" / name).parent.mkdir(parents=True)
        (tmp_path / "cache" / name).write_text("{}")
    for data in (TEXTS[0], TEXTS[3], TEXTS[5]):
        saved_config(stage_with(data), str(tmp_path / "cache"))
    for data in ({"name": "hub", "repo": "evil/text", "revision": "v2"}, {**TEXTS[0], "tasks": {"rows": WEB_TASK}}):
        with pytest.raises(UserError, match="a saved run fetches nothing"):
            saved_config(stage_with(data), str(tmp_path / "cache"))


def test_a_word_of_our_files_is_no_data_set_of_ours():
    check_trusted({"repo": "openai/gsm8k"}, "data")
    with pytest.raises(UserError, match="data.repo is 'docs/data.md', a data set of the hub"):
        check_trusted({"repo": "docs/data.md"}, "data")


def test_trust_covers_what_lies_below_and_no_neighbour():
    trust.trust(["https://example.org/data", "https://user:pw@example.com", "owner", "s3://bucket/a?versionId=1"])
    assert is_trusted("https://example.org/data/x.txt") and is_trusted("https://example.com/x?sig=1")
    assert is_trusted("owner/name") and is_trusted("s3://bucket/a")
    for other in ("https://example.org/data2", "https://example.com.evil.org/x", "owners/name", "s3://bucket/ab"):
        assert not is_trusted(other)


@pytest.mark.parametrize(
    "text,shown",
    [
        ("https://user:secret@host/x?a=1", "https://host/x"),
        ("s3://KEY:se/cret@bucket/x", "s3://bucket/x"),
        ("https://u:p@ss@host:99/x", "https://host:99/x"),
        ("s3://bucket/x?key=secret, and more", "s3://bucket/x, and more"),
        ("(https://host/a?sig=1,2&x=3): no", "(https://host/a): no"),
        ("see HTTPS://host/a#access_token=1.", "see HTTPS://host/a."),
        ("simplecache::ftp://u:p@host/x", "simplecache::ftp://host/x"),
        ("['https://h/a?x=1', 'https://u@h/b']", "['https://h/a', 'https://h/b']"),
        ("s3://bucket/part-?.txt", "s3://bucket/part-?.txt"),
        ("https://host:8080/a@b/c", "https://host:8080/a@b/c"),
        ("hf://datasets/owner/name@v2/data/*.parquet", "hf://datasets/owner/name@v2/data/*.parquet"),
        ("me@example.org asks: why?", "me@example.org asks: why?"),
    ],
)
def test_secrets_are_left_out_of_addresses(text, shown):
    assert without_secrets(text) == shown == without_secrets(shown)
    assert public({"a": [text], text: 1}) == {"a": [shown], shown: 1}


@pytest.mark.parametrize("text", ["://" * 300_000, "https://" * 120_000, "a" * 1_000_000, "x?://a=" * 100_000])
def test_texts_without_end_cost_little(text):
    start = time.process_time()
    assert len(without_secrets(text)) <= len(text)
    with contextlib.suppress(UserError):
        check_trusted({"tasks": {"a": {"train": text}}}, "run.json: config.data")
    assert time.process_time() - start < 10


def test_of_a_word_longer_than_any_address_what_may_be_secret_goes():
    secret = "s3://bucket/" + "x" * 3_000 + "?key=secret"
    assert without_secrets(f"read {secret} now") == "read s3... now"
