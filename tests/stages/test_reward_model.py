"""A reward model as a reward and as a judge: what it scores, how it is normalised, what is refused, exact resume."""

import csv
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import compose
from safetensors.torch import load_file
from small_rollouts import TOKENIZER, Task, kill, model

from callbacks.preference_eval import rates
from llm.checkpoint.model_folder import save_model_folder
from llm.data.preferences import render_row
from llm.errors import UserError
from llm.eval.preferences import length_controlled, wins
from llm.eval.reward_model import RewardModel, asked, data_answers
from llm.model.gpt import GPT
from llm.run.config_diff import diff_configs
from llm.run.stage_folder import write_manifest
from llm.scaling.rules import model_config
from llm.stages.common import with_scalar_head
from llm.stages.reward_model import RewardModelReward, load_reward_model
from llm.stages.run_stage import run_stage
from llm.tokenizer.bpe import Tokenizer

QUESTION = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok"}]}


def judge(rows=2) -> RewardModel:
    return RewardModel(model(3, scalar_head=True), TOKENIZER, model(), rows)


def scores(*texts, conversation=QUESTION) -> list[float]:
    return judge()([conversation] * len(texts), texts)


def test_the_reward_is_the_number_at_the_end_of_the_turn():
    texts = ["a", "abc", "", "ab"]  # of several lengths, in batches of two
    for text, found in zip(texts, scores(*texts), strict=True):
        row = {"messages": QUESTION["messages"][:1], "completion": [{"role": "assistant", "content": text}]}
        ids = render_row(TOKENIZER, row, 24)[0][0][0]
        assert ids[-1] == TOKENIZER.special_id("<|assistant_end|>")
        assert found == pytest.approx(judge().net.scalars(torch.tensor([ids]))[0, -1].item(), abs=1e-5)


def test_what_stands_in_calls_of_tools_earns_nothing():
    plain, called, forged = scores(
        "a", "a<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>", "a<|output_"
    )
    assert plain == called and plain != forged


def test_marks_of_the_chat_format_in_an_answer_are_text():
    ids = judge().sequence(asked(QUESTION) | {"completion": [{"role": "assistant", "content": "<|user_end|>"}]})[0]
    assert ids.count(TOKENIZER.special_id("<|user_end|>")) == 1


def test_the_turns_before_are_part_of_the_prompt():
    messages = asked(QUESTION | {"earlier": [("no", "again")]})["messages"]
    assert [m["content"] for m in messages] == ["Hi", "no", "again"]
    assert scores("a") != scores("a", conversation=QUESTION | {"earlier": [("n", "y")]})


def test_a_long_prompt_and_then_a_long_answer_lose_their_beginning():
    long = {"messages": [{"role": "user", "content": "x" * 40}]}
    ids, mask = judge().sequence(asked(long) | {"completion": [{"role": "assistant", "content": "abc"}]})
    assert len(ids) == len(mask) == 24 and TOKENIZER.decode(ids[-4:-1]) == "abc"
    ids, _ = judge().sequence(asked(long) | {"completion": [{"role": "assistant", "content": "ab" * 40}]})
    assert len(ids) == 24 and ids[0] == TOKENIZER.bos_id and TOKENIZER.decode(ids[-3:-1]) == "ab"


def test_answers_of_the_data_are_pairs_or_those_of_two_questions():
    prompt, good, bad = [QUESTION["messages"][:1], *([{"role": "assistant", "content": text}] for text in "yn")]
    pair, labelled = {"messages": prompt, "chosen": good, "rejected": bad}, {"messages": prompt, "completion": bad}
    assert [row["completion"] for row in data_answers([pair, labelled])] == [good, bad, bad]
    other = {"messages": [{"role": "user", "content": "Ho"}, *bad]}
    rows = data_answers([QUESTION, other])
    assert [row["messages"] for row in rows] == [prompt, prompt, other["messages"][:1], other["messages"][:1]]
    assert [row["completion"][0]["content"] for row in rows] == ["ok", "n", "n", "ok"]


def test_a_normalised_reward_has_the_answers_of_the_data_around_0():
    plain, normal = (RewardModelReward(Task(), "any", normalise=how) for how in (False, True))
    plain.score = normal.score = judge()
    conversations = [Task()[i] for i in range(5)]
    own = torch.tensor(normal(conversations, ["x"] * 5)).double()  # in this task all answers are x
    assert own.mean().abs() < 1e-5 and own.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    a, b = plain(conversations, ["q"] * 5), normal(conversations, ["q"] * 5)
    mean, deviation = normal.scale
    assert b == pytest.approx([(one - mean) / deviation for one in a])


# ---------------------------------------------------------------------------------------------------------------------
# Win rates


def test_wins_count_ties_half():
    assert wins([1.0, 2.0, 0.5], [0.0, 2.0, 1.0]) == [1.0, 0.5, 0.0]


def test_the_columns_of_wins_by_hand():
    """Takes equal answers for a tie, whatever their scores, and tells the score and the lengths of the answers now."""
    texts, judged = [("abc", "a"), ("same", "same"), ("x", "yz")], [(1.0, 0.0), (2.0, 1.9), (0.0, 3.0)]
    pairs = [
        tuple({"text": text, "judge": number, "rule": number} for text, number in zip(*one, strict=True))
        for one in zip(texts, judged, strict=True)
    ]
    by_judge = {name.removeprefix("preference/"): value for name, value in rates(pairs, "won", "judge").items()}
    assert (by_judge["won"], by_judge["length"], by_judge["length_parent"]) == pytest.approx((0.5, 8 / 3, 7 / 3))
    assert (by_judge["won_lc"], by_judge["won_lc_stderr"]) == length_controlled([1.0, 0.5, 0.0], [2, 0, -1])
    by_rule = rates(pairs, "won", "rule")
    assert by_rule.keys() == {"preference/won", "preference/won_stderr", "preference/rule"}
    assert by_rule["preference/rule"] == 1.0 and by_rule["preference/won"] == 0.5


def test_without_a_difference_of_lengths_the_rate_is_that_of_wins():
    rate, error = length_controlled([1.0] * 30 + [0.0] * 10, [0] * 40)
    assert rate == pytest.approx(0.75, abs=1e-3) and error == pytest.approx(math.sqrt(0.75 * 0.25 / 40), rel=1e-2)


def test_wins_by_length_alone_are_no_wins_and_good_short_answers_gain():
    longer = [30, 20, 10, 5] * 25 + [-30, -20, -10, -5] * 15
    won = [float((x > 0) != (i % 20 < 4)) for i, x in enumerate(longer)]  # four fifths by length
    by_length, _ = length_controlled(won, longer)
    assert sum(won) / len(won) > 0.57 and by_length == pytest.approx(0.5, abs=0.03)
    by_chance = [1.0, 0.0, 1.0, 1.0]
    assert length_controlled(by_chance * 40, longer)[0] == pytest.approx(0.75, abs=0.02)
    always, _ = length_controlled([1.0] * 50, [-5] * 50)
    assert 0.98 < always < 1  # finite, where every comparison is won


def test_the_regression_is_the_maximum_of_its_likelihood():
    g = torch.Generator().manual_seed(0)
    longer = torch.randn(200, generator=g).mul(20).round().tolist()
    won = [float(torch.rand(1, generator=g) < 1 / (1 + math.exp(-0.4 - x / 20))) for x in longer]
    rate, _ = length_controlled(won, longer)
    x, y = (
        torch.tanh(torch.tensor(longer).double() / torch.tensor(longer).double().std(correction=0)),
        torch.tensor(won),
    )
    weights = torch.zeros(2).double().requires_grad_()
    descent = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        descent.zero_grad()
        logits = weights[0] + weights[1] * x
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.double(), reduction="sum")
        loss = loss + 0.005 * weights.square().sum()
        loss.backward()
        return loss

    descent.step(closure)
    assert rate == pytest.approx(weights[0].sigmoid().item(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


SMALL = ("model.depth=1", "precision.compute=fp32", "trainer=cpu", "callbacks=none", "optim=adamw")
FEW = (
    "stage.task=politeness",
    "data.preferences.politeness.size=40",
    "data.preferences.politeness.test_size=12",
    "stage.reward=reward_model",
    "stage.judge=tiny/reward",
)
OPTIONS = "stage.reward_options={reward_model: {model: tiny/reward}}"


@pytest.fixture
def runs(tokenizer_runs, tmp_path):
    """runs/ with a network of random weights as the stage sft of the run `tiny`, and one with a head as its reward."""
    root = shutil.copytree(tokenizer_runs, tmp_path / "runs")
    tokenizer = Tokenizer.load(root / "tiny" / "tokenizer" / "model")
    cfg = compose("train", "experiment=tiny", *SMALL)
    net = GPT(model_config(cfg.model, cfg.arch, tokenizer.vocab_size)).init_weights(0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    judged = with_scalar_head(net, True)
    judged.scalar_head.weight.data.normal_(0, 1, generator=g)
    for name, network in (("sft", net), ("reward", judged)):
        save_model_folder(root / "tiny" / name / "model", network, tokenizer)
        write_manifest(root / "tiny" / name, {"status": "finished", "finished": "now", "stage": name})
    return root


def config(root, stage, run, *more):
    lines = (*SMALL, *FEW, f"stage={stage}", f"run={run}", "init_from=tiny/sft", f"paths.runs={root}")
    return compose("train", "experiment=tiny", *lines, *more)


@pytest.mark.parametrize(
    "lines, words",
    [
        ((), "stage.reward_options.reward_model: .*missing a required argument: 'model'"),
        (("stage.reward_options={reward_model: {model: 3}}",), r"reward_model.model=3: name a model, <run>/<stage>"),
        (("stage.reward_options={reward_model: 3}",), "stage.reward_options.reward_model=3: must be a mapping"),
        (("stage.reward_options=[reward_model]",), "stage.reward_options=.*must be a mapping"),
        (("stage.reward_options={reward_model: {model: tiny/nothing}}",), "there is no stage 'nothing'"),
        (
            ("stage.reward_options={reward_model: {model: tiny/sft}}",),
            "is no reward model; train one with stage=reward",
        ),
        ((OPTIONS, "stage.judge=tiny/sft"), "stage.judge=tiny/sft: .* is no reward model"),
        ((OPTIONS.replace("reward}", "reward, normalise: 2}"),), "normalise=2: must be true or false"),
        ((OPTIONS, "stage.task=courtesy"), "stage.task=courtesy: not among data.tasks and data.preferences"),
        (
            ("stage.reward=null", "stage.reward_options={reward_model: {model: tiny/reward}}"),
            "stage.reward names no such reward",
        ),
    ],
)
def test_settings_that_make_no_sense_are_one_line(runs, lines, words):
    with pytest.raises(UserError, match=words) as refused:
        run_stage(config(runs, "grpo", "wrong", *lines))
    assert "\n" not in str(refused.value) and not (runs / "wrong").exists()


def test_models_that_do_not_fit_are_refused(runs):
    cfg = config(runs, "grpo", "tiny", OPTIONS)
    tokenizer = Tokenizer.load(runs / "tiny" / "sft" / "model")
    net = SimpleNamespace(config=SimpleNamespace(seq_len=128))

    def refusal(network, of=tokenizer):
        save_model_folder(runs / "other", network, of)
        with pytest.raises(UserError) as refused:
            load_reward_model(cfg, net, tokenizer, "stage.judge", str(runs / "other"))
        return str(refused.value)

    fitting = replace(model(scalar_head=True).config, seq_len=128, vocab_size=tokenizer.vocab_size)
    assert "gives every answer the reward 0" in refusal(GPT(fitting).init_weights(0))
    assert "has another tokenizer (265 tokens) than the trained" in refusal(model(scalar_head=True), TOKENIZER)
    short = GPT(replace(fitting, seq_len=64)).init_weights(0)
    short.scalar_head.weight.data.fill_(1.0)
    assert "its context of 64 tokens is shorter than model.seq_len=128" in refusal(short)


def test_other_sources_of_preferences_do_not_matter():
    def settings(**sources):
        return {"stage": {"task": "politeness"}, "data": {"preferences": {n: {"size": s} for n, s in sources.items()}}}

    old = settings(politeness=3, brevity=4)
    assert not diff_configs(old, settings(politeness=3, brevity=5))
    assert [key for key, *_ in diff_configs(old, settings(politeness=4))] == ["data.preferences.politeness.size"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["grpo", "ppo", "best_of_n"])
def test_a_stage_rewarded_by_a_model_resumes_exactly(runs, stage):
    lines = (OPTIONS, "save_every=1", "keep_last=4", "max_steps=4", "stage.max_new_tokens=8", "stage.lr_frac=1")
    more = ("stage.min_reward=-100",) if stage == "best_of_n" else ()
    run_stage(config(runs, stage, "straight", *lines, *more))
    further = json.loads((runs / "straight" / stage / "run.json").read_text())["further"]
    assert list(further) == ["stage.reward_options.reward_model.model", "stage.judge"]
    kill(runs, stage, (2, 3, 4))
    run_stage(config(runs, stage, "killed", *lines, *more))
    a, b = (load_file(runs / name / stage / "model" / "model.safetensors") for name in ("straight", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    with open(runs / "straight" / stage / "metrics.csv", newline="") as file:
        first, *_, last = list(csv.DictReader(file))
    assert float(first["preference/win_rate"]) == float(first["preference/win_rate_judge"]) == 0.5
    assert 0 <= float(last["preference/win_rate_judge_lc"]) <= 1 and "pass@1" not in last
