"""A Python that is newer than the tested ones."""

import pytest

from llm.cli.overrides import check_overrides
from llm.errors import UserError


def test_a_hydra_that_fails_on_a_new_python_is_one_line(monkeypatch):
    """On Python 3.14 `argparse` refuses the help text of an option of Hydra 1.3."""

    def refuse():
        raise ValueError("badly formed help string")

    monkeypatch.setattr("hydra._internal.utils.get_args_parser", refuse)
    with pytest.raises(UserError, match=r"^Hydra 1\.\S+ cannot read .* on Python 3\.\d+ \(badly formed .*3.13"):
        check_overrides("train", ["experiment=tiny"])
