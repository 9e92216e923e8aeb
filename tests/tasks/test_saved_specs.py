"""Tasks and text of a saved configuration with values of wrong kinds: one line that names the key."""

import pytest
from omegaconf import OmegaConf

from llm.data.sources import build_source
from llm.errors import UserError
from tasks import Cache, build_task


@pytest.mark.parametrize(
    "change,words",
    [
        ({"source": "embedded", "options": {"a": 1}}, "takes no option a"),
        ({"source": "embedded", "options": {"steps": "x"}}, "data.tasks.t.options=.*cannot use them"),
        ({"source": "embedded", "type": "identity", "options": {"maker": 5}}, "data.tasks.t.options=.*cannot use them"),
        ({"train": 5, "test": 7}, "data.tasks.t.train=5: must be a text, or a list of texts"),
        ({"test": 1.5}, "data.tasks.t.test=1.5: must be a text"),
        ({"test": True}, "data.tasks.t.test=True: must be a text"),
        ({"test": {"a": 1}}, "data.tasks.t.test=.*must be a text"),
        ({"test": [["a"]]}, "data.tasks.t.test=.*must be a text"),
        ({"test": "/dev/zero"}, "no file matches /dev/zero"),
        ({"test": "a\0b"}, "no file matches"),
        ({"test": "y" * 5000}, r"data.tasks.t.test: y{80}: the name is too long"),
    ],
)
def test_wrong_values_are_one_line(tmp_path, change, words):
    spec = {"type": "gsm8k", "source": "local", "size": 4, "test_size": 4} | change
    with pytest.raises(UserError, match=words) as refused:
        build_task("t", spec, "test", Cache(tmp_path))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "data,key",
    [
        ({"name": "local", "path": "x", "train": 5}, "data.train"),
        ({"name": "local", "path": "x", "val": [1]}, "data.val"),
        ({"name": "mixture", "sources": {"a": {"path": "x", "val": {"b": 1}}}}, "data.sources.a.val"),
        ({"name": "tokens", "path": "x", "val": True}, "data.val"),
    ],
)
def test_wrong_entries_of_text_are_one_line(data, key):
    with pytest.raises(UserError, match=f"{key}=.*must be a text, or a list of texts"):
        build_source(OmegaConf.create(data), "cache")
