"""Tests of how people are shown what a stage trains on."""

import shutil

import torch
from conftest import REPO, compose, run_cli

from llm.checkpoint.model_folder import save_model_folder
from llm.data.loader import ConversationSteps, StepLayout
from llm.model.gpt import build_network
from llm.run.stage_folder import write_manifest
from llm.scaling.rules import model_config
from llm.stages.show_batch import for_page, for_terminal, pieces, rows_of, show
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.chat_format import render_conversation
from llm.utils.format import harmless

TALK = {"messages": [{"role": "user", "content": "How many apples?"}, {"role": "assistant", "content": "12 <apples>"}]}


def test_what_is_trained_is_what_the_mask_says(tiny_tokenizer):
    step = next(ConversationSteps([TALK] * 3, tiny_tokenizer, StepLayout(60, 2)).steps())
    (ids, weights), *_ = rows_of(step["micro"])
    shown = pieces(ids, weights, tiny_tokenizer)
    assert "".join(text for kind, text in shown if kind == "trained").startswith("12 <apples>")
    assert "How many apples?" in "".join(text for kind, text in shown if kind == "context")
    assert ("special trained", "<|assistant_end|>") in shown and "tokens of filling]" in shown[-1][1]
    mask = render_conversation(tiny_tokenizer, TALK)[1]
    assert [float(m) for m in mask] == [float(w != 0) for w in weights[: len(mask)]]
    assert "\033[32m12 <apples>" in for_terminal([shown]) and "12 &lt;apples&gt;" in for_page([shown], "a & b")
    assert "<h1>a &amp; b</h1>" in for_page([shown], "a & b")


def test_text_does_nothing_to_the_terminal():
    """Show what would colour, ring or turn the text around; keep lines, tabs and our own colours."""
    text = "a\n\tb\x1b[31m\x07\r\x9b\u202eל\u200fé"
    assert harmless(text) == "a\n\tb\\x1b[31m\\x07\\r\\x9b\\u202eל\u200fé"
    assert for_terminal([[("trained", "\x1b[2J")]]) == "\033[32m\\x1b[2J\033[0m"


def test_answers_that_are_made_less_likely_are_red(tiny_tokenizer):
    ids = torch.tensor([tiny_tokenizer.encode("one two three")])
    targets = ids[:, 1:].clone()
    targets[0, 0] = -1
    micro = {"inputs": ids[:, :-1], "targets": targets, "advantages": torch.full(targets.shape, -0.5)}
    (row,) = rows_of([micro])
    kinds = [kind for kind, _ in pieces(*row, tiny_tokenizer)]
    assert kinds == ["context", "punished"]


def test_the_command_shows_the_batch_of_a_stage(tokenizer_runs, tmp_path):
    shutil.copytree(tokenizer_runs, tmp_path, dirs_exist_ok=True)
    page = tmp_path / "batch.html"
    args = ["--rows", "1", "--html", str(page), "experiment=tiny", "stage=pretrain", f"paths.runs={tmp_path}"]
    done = run_cli("llm/stages/__main__.py", *args, PYTHONPATH=str(REPO))
    assert done.returncode == 0, done.stderr
    assert "tiny/pretrain, first step: 4 rows, 512 tokens, 512 trained; 1 shown" in done.stdout
    assert page.read_text().count("<pre>") == 1
    assert not (tmp_path / "tiny" / "pretrain").exists()


def test_the_answers_of_a_run_stay_where_others_are_shown(tokenizer_runs, tmp_path, capsys):
    """They were replaced by those of the batch shown; and a command without run= ended in a traceback."""
    shutil.copytree(tokenizer_runs, tmp_path, dirs_exist_ok=True)
    few = ("stage.prompts_per_step=1", "stage.samples_per_prompt=2", "stage.max_new_tokens=4")
    cfg = compose("train", "experiment=tiny", "stage=grpo", "run=null", "init_from=tiny/sft", *few)
    cfg.paths.runs = str(tmp_path)
    tokenizer = Tokenizer.load(tmp_path / "tiny" / "tokenizer" / "model")
    net = build_network(model_config(cfg.model, cfg.arch, tokenizer.vocab_size)).init_weights(1)
    save_model_folder(tmp_path / "tiny" / "sft" / "model", net, tokenizer)
    write_manifest(tmp_path / "tiny" / "sft", {"status": "finished", "finished": "now", "stage": "sft"})
    kept = tmp_path / "d2" / "grpo" / "rollouts.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("of the training")
    show(cfg)
    assert "d2/grpo, first step: " in capsys.readouterr().out
    assert [path.read_text() for path in kept.parent.iterdir()] == ["of the training"]
