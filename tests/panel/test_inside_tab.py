"""The Inside tab: what is shown of a real small network, and what is refused."""

import re

import gradio as gr
import pytest
import torch

from llm.checkpoint.model_folder import save_model_folder
from llm.errors import UserError
from llm.inference.inside import Inside, look_inside
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.panel import inside_view as view
from llm.panel.inside_tab import QUESTION, TEXT, InsideTab
from llm.panel.models import MOST_TOKENS, PanelModels
from llm.panel.state import Panel
from llm.run.stage_folder import RunDir, write_manifest


def save_stage(root, tokenizer, stage="sft", run="tiny", seed=0, status="finished"):
    """Save a network with random weights as a finished stage; returns its folder."""
    net = GPT(GPTConfig(2, 2, 2, 16, 32, 128, tokenizer.vocab_size)).init_weights(seed)
    drawn = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=drawn) * 0.2)
    folder = RunDir(root, run).path / stage
    write_manifest(folder, {"stage": stage, "status": status, "config": {"stage": {"name": stage}}})
    save_model_folder(folder / "model", net, tokenizer)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("inside") / "runs"
    save_stage(root, tiny_tokenizer)
    save_stage(root, tiny_tokenizer, "pretrain")
    save_stage(root, tiny_tokenizer, "reward")
    return PanelModels(Panel(root, root / "queue.sqlite", (root,)))


@pytest.fixture(scope="module")
def inside(models) -> Inside:
    ids, _ = models.ids_of("tiny/pretrain", "The <b> fox\nhas 12.", False)
    return models.inside("tiny/pretrain", ids)


def test_tokens_have_the_probabilities_of_the_network(inside):
    logprobs, ranks = view.logprobs_of(inside), view.ranks_of(inside)
    by_hand = inside.logits.double().softmax(-1)
    for place in range(1, len(inside.ids)):
        row = by_hand[place - 1]
        assert float(logprobs[place].exp()) == pytest.approx(float(row[inside.ids[place]]), rel=1e-4)
        assert ranks[place] == int((row > row[inside.ids[place]]).sum()) + 1
    assert logprobs[0].isnan() and ranks[0] == 0
    shown = view.tokens_view(inside, [0] * len(inside.ids), 2)
    assert shown.count('class="heat') == len(inside.ids) and shown.count('class="heat at"') == 1
    assert ">&lt;</span>" in shown and "\n" not in shown and "⏎" in shown
    assert f"perplexity {float((-logprobs[1:].mean()).exp()):.2f}" in shown
    chosen = view.tokens_view(inside, [0] * (len(inside.ids) - 1) + [1], 0)
    assert chosen.count(' chosen"') == 1 and f"model chose {float(logprobs[-1]):.3f} nats" in chosen
    alone = look_inside(inside._net, inside._tokenizer, inside.ids[:1])
    assert "1 tokens; mean logprob 0.000" in view.tokens_view(alone, [0], 0) and "nan" not in view.positions_view(alone)


def test_the_next_tokens_are_the_likeliest_and_the_one_that_follows_is_marked(inside):
    shown = view.next_view(inside, 1, 3)
    share, best = inside.logits[1].softmax(-1).max(-1)
    assert f'<td class="n">{float(share):.4f}</td>' in shown and view.named(inside.token_text(int(best))) in shown
    assert shown.count("←") == 1 and shown.count("<tr>") in (4, 5)
    assert "←" not in view.next_view(inside, 10**6), "nothing follows the last one"
    table = view.positions_view(inside)
    assert table.count("<tr>") == len(inside.ids) + 1 and "\n" not in table


def test_attention_is_shown_as_text_and_as_maps(inside):
    shown = view.attention_view(inside, 1, 0, 3)
    shares = inside.attention[1, 0, 3]
    most = int(shares.argmax())
    assert f"(position {most}) {100 * float(shares[most]):.0f}\u00a0%" in shown and "Layer 2, head 1" in shown
    assert shown.count('class="heat') == 4, "nothing looks ahead"
    assert view.heads_view(inside).count("<img") == inside.attention.shape[0] * inside.attention.shape[1]
    assert view.attention_view(inside, 99, 99, 99).count("<img") == 1


def test_a_picture_has_a_pixel_for_each_share():
    import base64
    from io import BytesIO

    from PIL import Image

    code = re.search(r"base64,([^\"]*)", view.picture(torch.tensor([[1.0, 0.0], [0.25, 0.75]]), "a <b>"))
    image = Image.open(BytesIO(base64.b64decode(code[1])))
    assert [image.getpixel((x, y))[3] for y in (0, 1) for x in (0, 1)] == [255, 0, 128, 221]


def test_the_lens_ends_at_the_logits(inside):
    shown = view.lens_view(inside, 2)
    best, share = inside.likeliest(inside.logits[2], 1)[0]
    assert shown.count("<tr>") == len(inside.stream) + 1
    assert f"{view.named(best)} {100 * share:.1f}\u00a0%".replace("<", "&lt;") in shown
    torch.testing.assert_close(inside.lens(1)[2], inside.lens(1, 2))
    grid = view.lens_grid(inside)
    assert grid.count('class="heat') == len(inside.stream) * len(inside.ids)
    assert grid.index("layer 2") < grid.index("embedding")


def test_calls_of_the_calculator_are_told_step_by_step(tiny_tokenizer):
    net = GPT(GPTConfig(1, 1, 1, 8, 8, 128, tiny_tokenizer.vocab_size)).init_weights(0)
    call = "<|bos|>x<|python_start|>(1+2)*3<|python_end|>"
    ids = tiny_tokenizer.encode_prompt(call + "<|output_start|>9<|output_end|>y")
    shown = view.calculator_view(look_inside(net, tiny_tokenizer, ids), [0] * len(ids))
    for step in ("the model writes (1+2)*3", "1. 1 + 2 = 3", "2. 3 * 3 = 9", "The engine wrote the result 9"):
        assert step in shown
    own = view.calculator_view(look_inside(net, tiny_tokenizer, ids), [1] * len(ids))
    assert "The model itself wrote the result 9. The calculator has 9." in own
    for rest in ("", "2"):
        ids = tiny_tokenizer.encode_prompt(call + rest)
        assert "Nothing was written" in view.calculator_view(look_inside(net, tiny_tokenizer, ids), [0] * len(ids))
    assert "no call" in view.calculator_view(look_inside(net, tiny_tokenizer, [tiny_tokenizer.bos_id]), [0])


def test_models_are_those_that_write_and_a_question_gets_an_answer(models):
    assert models.names() == ["tiny/pretrain", "tiny/sft"] and models.chatting() == ["tiny/sft"]
    ids, mask = models.ids_of("tiny/sft", "Who?", True, 8)
    tokenizer = models._loaded[next(reversed(models._loaded))].engine.tokenizer
    assert tokenizer.decode(ids).startswith("<|bos|><|user_start|>Who?<|user_end|><|assistant_start|>")
    assert len(mask) == len(ids) and 1 <= sum(mask) <= 9
    given, none = models.ids_of("tiny/sft", "Who?", False)
    assert given == tokenizer.encode_prompt("Who?") and not any(none)


def test_what_cannot_be_looked_into_is_refused(models, tiny_tokenizer):
    for name, content, said in (
        ("tiny/reward", "x", "whose model writes text"),
        ("tiny/none", "x", "no such stage"),
        ("../tiny/sft", "x", "plain folder name|no such stage"),
        ("tiny/sft", " ", "give a text"),
        ("tiny/sft", "x " * MOST_TOKENS, "are looked into at most"),
    ):
        with pytest.raises(UserError, match=said):
            models.ids_of(name, content, False)
    folder = save_stage(models.panel.runs, tiny_tokenizer, "dpo", status="interrupted")
    with pytest.raises(UserError, match="only a finished stage"):
        models.ids_of("tiny/dpo", "x", False)
    assert "tiny/dpo" not in models.names() and folder.is_dir()
    panel = models.panel
    fixed = PanelModels(Panel(panel.runs, panel.queue_file, panel.folders, readonly=True))
    with pytest.raises(UserError, match="panel.readonly=true"):
        fixed.ids_of("tiny/sft", "x", False)


def test_a_model_that_was_trained_anew_is_loaded_anew_and_two_are_kept(models, tiny_tokenizer):
    root = models.panel.runs
    models.inside("tiny/sft", models.ids_of("tiny/sft", "fox", False)[0])
    save_stage(root, tiny_tokenizer, run="other")
    ids, _ = models.ids_of("other/sft", "fox", False)
    before = models.inside("other/sft", ids)
    assert models.inside("other/sft", ids) is before, "the last looks are kept"
    save_stage(root, tiny_tokenizer, run="other", seed=5)
    assert not torch.equal(models.inside("other/sft", ids).logits, before.logits)
    assert [name for name, _ in models._loaded] == ["tiny/sft", "other/sft"], "the old weights are let go"


def test_the_tab_shows_everything_at_once_and_moves(models):
    with gr.Blocks():
        tab = InsideTab(models)
    assert tab.choices(None)["value"] in models.names()
    look, said, rest, at, layer, _, tokens, following, attention, lens, *fixed = tab.begin("tiny/sft", TEXT, "a fox")
    assert said == "" and rest["visible"] and at["value"] == len(look[1]) - 1 and layer["maximum"] == 2
    assert all("panel-html" in one for one in (tokens, following, attention, lens, *fixed)) and len(fixed) == 4
    moved = tab.move(look, 0, 2, 1)
    assert "position 0" in moved[1] and "Layer 2, head 1" in moved[2] and moved[0] != tokens
    assert tab.turn(look, 0, 1, 2) != moved[2]
    asked = tab.begin("tiny/sft", QUESTION, "Who?")
    assert any(asked[0][2]) and "chosen" in asked[6]
    failed = tab.begin(None, TEXT, "x")
    assert failed[0] is None and "choose a model" in failed[1] and len(failed) == len(asked)
    assert tab.move(None, 0, 1, 1) == [gr.skip()] * 4
