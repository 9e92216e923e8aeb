"""One function reads JSON of a run, `llm.utils.files.parse_json`: the sources call no other parser but where listed."""

import ast

import pytest
from conftest import REPO

# Calls that turn bytes of a file or of another program into values; `torch.load` reads tensors and primitives only.
PARSERS = {"json.load", "json.loads", "json.JSONDecoder", "OmegaConf.load", "torch.load", "ast.literal_eval"}
PARSERS |= {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "tomllib.load"}
PARSERS |= {
    "yaml.load",
    "yaml.safe_load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "numpy.load",
    "np.load",
    "eval",
    "exec",
}
ALLOWED = {
    ("llm/utils/files.py", "json.loads"): "parse_json itself",
    ("llm/cli/options.py", "OmegaConf.load"): "main files of the configuration, in one place",
    ("llm/config/experiments.py", "OmegaConf.load"): "experiments of the user's; Hydra says what is wrong with them",
    ("llm/cli/sweep.py", "OmegaConf.load"): "the results that Hydra's sweeper has just written",
    ("llm/data/records.py", "json.loads"): "rows of data, each with its own error",
    ("llm/data/records.py", "json.JSONDecoder"): "rows of data in one array, read piece by piece",
    ("llm/eval/core_bundle.py", "json.loads"): "rows of a CORE bundle, each with its own error",
    ("tasks/sandbox/messages.py", "json.loads"): "messages between processes without llm; floats may be NaN",
    ("tasks/sandbox/judge.py", "exec"): "the program that is judged, in the sandbox",
    ("tasks/files.py", "pickle.loads"): "rows that the same process has put into a nameless file",
    ("llm/data/near_duplicates.py", "np.load"): "arrays in the cache, without objects",
    ("llm/serving/api/tools.py", "json.loads"): "calls of functions that a model writes; what is none stays text",
    ("llm/serving/frames.py", "pickle.loads"): "messages of a server's own workers, over a socket pair",
    ("llm/checkpoint/resume.py", "torch.load"): "checkpoints, weights_only=True",
    ("llm/checkpoint/nanochat.py", "torch.load"): "checkpoints of nanochat, weights_only=True",
}


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` of a name or attribute, "?" for what is neither."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def parsers_in(source: str) -> list[tuple[str, ast.Call]]:
    """Return the parsers that a source calls, under the names by which it imports them."""
    tree, names = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) and node.module else ""
            names |= {alias.asname or alias.name: f"{module}{alias.name}" for alias in node.names}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            head, _, rest = dotted(node.func).partition(".")
            full = ".".join(filter(None, (names.get(head, head), rest))).removeprefix("omegaconf.")
            full = "np.load" if full == "numpy.load" else full
            if full in PARSERS:
                found.append((full, node))
    return found


def test_no_other_parser_in_the_sources():
    files = [
        path for pattern in ("*", "llm/**/*", "callbacks/**/*", "tasks/**/*") for path in REPO.glob(f"{pattern}.py")
    ]
    found = {
        (path.relative_to(REPO).as_posix(), name): call for path in files for name, call in parsers_in(path.read_text())
    }
    assert set(found) <= set(ALLOWED), "read it by llm.utils.files.read_json or parse_json"
    assert set(ALLOWED) <= set(found), "an entry of ALLOWED is not needed any more"
    for (path, name), call in found.items():
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        assert name != "torch.load" or options.get("weights_only") == "True", path
        assert name != "np.load" or options.get("allow_pickle", "False") == "False", path


@pytest.mark.parametrize(
    "source,name",
    [
        ("import json\njson.loads('1')", "json.loads"),
        ("import json as j\nj.load(f)", "json.load"),
        ("from json import loads as l\nl('1')", "json.loads"),
        ("def f():\n    from yaml import safe_load\n    return safe_load(x)", "yaml.safe_load"),
        ("from omegaconf import OmegaConf\nOmegaConf.load(p)", "OmegaConf.load"),
        ("import numpy\nnumpy.load(p)", "np.load"),
        ("import torch\ntorch.load(p)", "torch.load"),
        ("eval('1')", "eval"),
    ],
)
def test_a_new_parser_is_found(source, name):
    assert [found for found, _ in parsers_in(source)] == [name]
    assert not parsers_in("import json\njson.dumps(1)\nnet.to(1).eval()\nnet.eval()\n")
