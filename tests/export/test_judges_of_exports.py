"""lm-eval over exported folders: its own model of transformers loads them, and scores as we score the run."""

import pytest
import torch
from judging import ROWS, TEXTS, by_harness, by_hf_of_lm_eval, likelihoods
from test_export import export, finish

from llm.model.config import GPTConfig
from llm.model.gpt import build_network
from llm.model.qwen3_config import Qwen3Config
from llm.tokenizer.bpe import Tokenizer, checked_pattern
from llm.tokenizer.compression import SAMPLE_TEXTS

pytest_plugins = ["judging"]  # its fixtures
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("offline")]
SHAPE = {"n_layer": 3, "n_head": 2, "n_kv_head": 1, "head_dim": 16, "n_embd": 32, "seq_len": 128}
MODERN = {
    "arch": "modern", "qk_scale": 1.2, "window_pattern": "SL", "window_multiple": 4, "window_divisor": 12,
    "value_embeds": True, "residual_scalars": True, "smear": True, "backout": True,
}  # fmt: skip
ARCHS = {
    "classic": {"arch": "classic"},
    "modern": MODERN,
    "gpt2": {"arch": "gpt2", "softcap": None, "vocab_multiple": 1, "tied": True, "n_kv_head": 2},
    "qwen3": {"mlp_width": 64},
}
BY_THEIR_PROGRAM = ("modern", "gpt2")  # transformers has no such class: the folder's own program is run
STEPS = 40


def trained(arch: str, tokenizer: Tokenizer):
    """A tiny network after a few steps on texts whose phrases the tasks are made of."""
    kind = Qwen3Config if arch == "qwen3" else GPTConfig
    net = build_network(kind(**(SHAPE | {"vocab_size": tokenizer.vocab_size} | ARCHS[arch]))).init_weights(0)
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)][:40] for text in TEXTS]
    rows = torch.tensor([row for row in rows if len(row) == 40] or [row[:8] for row in rows])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(STEPS):
        loss = net(rows[:, :-1], targets=rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("arch", ARCHS)
def test_lm_eval_scores_an_exported_folder_as_we_score_the_run(arch, tasks, tmp_path):
    tokenizer = Tokenizer.train([*SAMPLE_TEXTS.values(), *TEXTS], 400, checked_pattern("qwen2"))
    net = trained(arch, tokenizer)
    finish(tmp_path / "runs/q/sft", net, tokenizer)
    export(tmp_path, "run=q", f"out={tmp_path}/hf")
    names = ["mine_choice", "mine_answer", "mine_text"]
    ours, records = by_harness(net, tokenizer, tasks, tmp_path / "ours", *names)
    code = {"trust_remote_code": True} if arch in BY_THEIR_PROGRAM else {}
    theirs = by_hf_of_lm_eval(tmp_path / "hf", tasks, *names[:2], dtype="float32", add_bos_token=True, **code)
    # A whole text gets a BOS token from lm-eval itself: with another one of the tokenizer it would be scored, too.
    texts = by_hf_of_lm_eval(tmp_path / "hf", tasks, names[2], dtype="float32", add_bos_token=False, **code)
    results = theirs["results"] | texts["results"]
    for task in names:
        for metric, score in ours[task].items():
            if metric not in ("n", "shots"):
                assert results[task][f"{metric},none"] == pytest.approx(score, rel=1e-4), (task, metric)
    for one, other in zip(records["mine_answer"], theirs["samples"]["mine_answer"], strict=True):
        assert one["responses"] == other["filtered_resps"]
    sums, _ = likelihoods(theirs["samples"]["mine_choice"], "filtered_resps")
    for item, mine in likelihoods(records["mine_choice"])[0].items():
        assert sums[item] == pytest.approx(mine, abs=2e-3)
    assert len(sums) == len(ROWS)
