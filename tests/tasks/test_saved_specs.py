"""Tasks of a saved configuration with values of wrong kinds: one line that names the key."""

import pytest

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
