"""The GRPO family: how answers become batches, what their gradient is, how a rollout goes on after a kill."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import compose
from omegaconf import OmegaConf
from small_rollouts import TOKENIZER, Task, by_length, model, same, settings
from small_training import CONFIG, OPTIM, STAGE, STEPS, fit, net, rows, step_batch

from callbacks.step_times import StepTimes
from llm import objectives
from llm.config import stage_schema
from llm.data.conversations import Rendered
from llm.data.loader import positions_for
from llm.data.packing import Document
from llm.errors import UserError
from llm.eval.task_scores import draw_answers
from llm.inference.engine import Completion, Engine
from llm.inference.sampling import SamplingParams
from llm.model.linear import resolve_compute_dtype
from llm.run.config_diff import BEFORE_KEYS, CHANGED_KEYS, diff_configs
from llm.stages.choices import check_policy
from llm.stages.grpo import GroupSteps, PolicyObjective, SignalWatch
from llm.stages.rollout_stage import evaluations
from llm.stages.rollouts import (
    Answer,
    Group,
    Questions,
    Reference,
    RolloutSteps,
    answer_of,
    counts,
    micro_batches_of,
    passed_tokens,
)
from llm.stages.step_module import StageContext, StepModule
from llm.stages.step_state import Sums


def all_different(conversations, completions) -> torch.Tensor:
    return torch.arange(float(len(completions))).square()


def group_steps(network=None, position=None, score=by_length, **changes) -> GroupSteps:
    network = model() if network is None else network
    reference = Reference(network) if changes.get("kl") else None
    return GroupSteps(
        Engine(network, TOKENIZER), Task(), settings(**changes), 4, 1, position, score, reference=reference
    )


def module_of(network, stage=None) -> StepModule:
    context = StageContext("grpo", None, torch.ones(70), STEPS, 8)
    return StepModule(network, OPTIM, STAGE, context, PolicyObjective(stage or settings()))


def numbers_of(module, batch) -> dict[str, float]:
    """Return what is logged of the passes of a batch."""
    module.sums = Sums()
    for micro in batch["micro"]:
        module.micro_loss(micro)
    return module.objective_numbers(batch["n_trained"])


# ---------------------------------------------------------------------------------------------------------------------
# Batches of answers


def test_an_answer_trains_sampled_tokens_and_the_end_of_turn():
    sample = Completion([7, 8, 9], [1, 0, 1], "stop", 5, [-0.1, None, -0.3], -0.4)
    got = answer_of([1, 2], sample, 6)
    assert (got.ids, got.mask) == ([1, 2, 7, 8, 9, 5], [0, 0, 1, 0, 1, 1])
    assert got.logprobs == [0.0, 0.0, -0.1, 0.0, -0.3, -0.4]
    assert (got.length, got.n_sampled, got.is_finished) == (3, 3, True)
    for reason in ("length", "stop"):  # by a text
        got = answer_of([1, 2], Completion([7, 8, 9], [1, 0, 1], reason, None, [-0.1, -0.2, -0.3]), 3)
        assert (got.ids, got.mask) == ([1, 2, 7, 8, 9], [0, 0, 1, 0, 1]) and got.logprobs[3] == 0.0


@pytest.mark.parametrize("end", ["<|bos|>", "<|assistant_end|>"])
def test_a_rollout_trains_the_token_that_ended_an_answer_and_tells_of_its_signal(monkeypatch, capsys, end):
    """The engine's answer is a letter and an end; the reward is 1 for all of them, so no group has a signal."""
    end_id, says = TOKENIZER.special_id(end), iter([ord("x"), TOKENIZER.special_id(end)] * 100)
    monkeypatch.setattr(
        "llm.inference.engine.Sampler.draw", lambda self, logits, draws: torch.full((logits.size(0),), next(says))
    )
    rewards = iter([[1.0, 0.0]] + [[1.0, 1.0]] * 11)
    steps = group_steps(
        score=lambda asked, answers: torch.tensor(next(rewards)), prompts_per_step=1, samples_per_prompt=2
    )
    batches = [next(iter(steps)) for _ in range(12)]
    assert batches[0]["metrics"]["no_signal"] == 0 and batches[0]["metrics"]["mixed_groups"] == 1
    targets = batches[0]["micro"][0]["targets"]
    assert [row[row >= 0].tolist() for row in targets] == [[ord("x"), end_id]] * 2
    assert [batch["metrics"]["no_signal"] for batch in batches[1:]] == [1.0] * 11
    told = [line for line in capsys.readouterr().out.splitlines() if "no signal" in line]
    assert len(told) == 2 and told[0].startswith("grpo: no signal in 5 steps in a row, up to step 6: all answers")
    assert "of questions had the same reward (mean 1.000)" in told[0] and "in 10 steps" in told[1]


def test_a_step_with_a_signal_begins_the_count_of_silent_ones_anew(capsys):
    watch = SignalWatch("questions")
    for step, silent in enumerate([True] * 4 + [False] + [True] * 5):
        watch.count(silent, step, 0.5)
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith("grpo: no signal in 5 steps in a row, up to step 10: ")


def random_answers() -> tuple[list, list, list[float], list]:
    """Ids, masks, advantages and the engine's log-probabilities of five sequences."""
    g, ids = torch.Generator().manual_seed(0), []
    for n in (3, 7, 5, 8, 4):
        ids.append(torch.randint(0, 70, (n,), generator=g).tolist())
    masks = [[0, 0] + [1] * (len(row) - 2) for row in ids]
    return ids, masks, [0.5, -0.5, 0.25, -0.25, 0.0], [[-4.0] * len(row) for row in ids]


@pytest.mark.parametrize("is_plain", [True, False])
def test_the_default_gradient_is_that_of_the_policy_loss(is_plain):
    """Against the definition: sum over sampled tokens of -advantage * log p, over the number of sampled tokens."""
    ids, masks, advantages, engine = random_answers()
    keep = [a != 0 for a in advantages]
    micro = micro_batches_of(ids, masks, 2, keep, advantages=advantages, logprobs_engine=engine)
    n_trained, n_tokens = counts(ids, masks)
    assert n_trained == sum(len(row) - 2 for row in ids) and n_tokens == sum(len(row) - 1 for row in ids)
    module = module_of(net())
    assert module.objective.is_plain
    module.objective.is_plain = is_plain
    for m in micro:
        (module.micro_loss(m) / n_trained).backward()
    got = [p.grad.clone() for p in module.net.parameters()]
    module.net.zero_grad()
    loss, gaps = torch.zeros(()), []
    for row, mask, advantage in zip(ids, masks, advantages, strict=True):
        logprobs = torch.log_softmax(module.net(torch.tensor([row[:-1]]))[0], -1)
        for t in range(1, len(row)):
            if mask[t]:
                loss = loss - advantage * logprobs[t - 1, row[t]]
                gaps += [abs(logprobs[t - 1, row[t]].item() + 4.0)] if advantage else []
    (loss / n_trained).backward()
    for a, p in zip(got, module.net.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)
    numbers = module.objective_numbers(n_trained)
    assert numbers["logprob_gap"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)
    assert numbers["logprob_gap_max"] == pytest.approx(max(gaps), rel=1e-4)


def test_answers_without_advantage_are_left_out_of_the_passes():
    ids, masks = [[1, 2, 3, 4], [1, 5, 6], [1, 7]], [[0, 0, 1, 1], [0, 0, 1], [0, 1]]
    micro = micro_batches_of(ids, masks, 8, [False, True, True], advantages=[0.0, 0.5, -0.5])
    assert len(micro) == 1 and micro[0]["inputs"].tolist() == [[1, 5], [1, 0]]
    assert micro[0]["targets"].tolist() == [[-1, 6], [7, -1]] and micro[0]["advantages"][1, 0] == -0.5
    assert passed_tokens(ids, [False, True, True]) == 3 and passed_tokens(ids, [False] * 3) == 1
    micro = micro_batches_of(ids, masks, 8, [False] * 3, advantages=[0.0] * 3)
    assert len(micro) == 1 and micro[0]["inputs"].shape == (1, 1) and not micro[0]["advantages"].any()
    (nothing,) = micro_batches_of([], [], 8, [], advantages=[], logprobs_engine=[])
    nothing["inputs"] += 1
    total, sums = PolicyObjective(settings())(net(), nothing)
    assert total == 0 and PolicyObjective.summary({n: v.item() for n, v in sums.items()}, 1)["ess"] == 0


def test_rehearsal_adds_the_mean_loss_of_other_conversations(monkeypatch):
    """One step's gradient = that of the rewarded answers + weight x that of the rehearsed rows' mean loss."""
    parts = [([1, 2, 3, 4], [0, 0, 1, 1]), ([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])]
    monkeypatch.setattr("llm.stages.rollouts.render_prompt", lambda tokenizer, c: [1])

    def rendered(tokenizer, row, limit):
        ids, mask = parts[row]
        return Rendered(Document(np.array(ids), np.array(mask, bool)), len(ids), False, 1, 1, False)

    monkeypatch.setattr("llm.stages.rollouts.render", rendered)
    engine = SimpleNamespace(net=net(), tokenizer=None)
    stage = settings(rehearsal=2, rehearsal_weight=0.5)
    steps = RolloutSteps(engine, Task(), stage, 1, 1, None, by_length, rehearsal=[0, 1, 2])
    assert [len(steps.rehearse(step, 10)[0]) for step in range(3)] == [2, 2, 2]
    micro, n_tokens = steps.rehearse(1, n_trained=10)  # rows 2 and 0: two passes of one row
    assert n_tokens == 1 + 3 and steps.balance.missing == 0 and steps.balance.trained == 13
    got = sum(module_of(engine.net).micro_loss(m) for m in micro) / 10
    wanted = torch.zeros(())
    for ids, mask in (parts[2], parts[0]):
        targets = torch.tensor([[i if trained else -1 for i, trained in zip(ids[1:], mask[1:], strict=True)]])
        wanted = wanted + engine.net(torch.tensor([ids[:-1]]), targets, reduction="sum")
    torch.testing.assert_close(got, 0.5 * wanted / 3)
    of_others = 30, 5  # trained and rehearsed tokens: the weight is one for all processes
    monkeypatch.setattr(
        "llm.stages.rollouts.collectives.all_reduce_sum",
        lambda own: [a + b for a, b in zip(own, of_others, strict=True)],
    )
    micro, _ = steps.rehearse(1, n_trained=10)
    assert {one["weights"].max().item() for one in micro} == {0.5 * (10 + 30) / (3 + 5)}


def test_a_message_is_rehearsed_by_its_own_weight():
    def row(**more):
        answer = {"role": "assistant", "content": "yes"} | more
        return {"messages": [{"role": "user", "content": "Well?"}, answer]}

    rehearsal = [row(train=0.25), row()]
    engine = Engine(model(), TOKENIZER)
    steps = RolloutSteps(engine, Task(), settings(rehearsal=2), 1, 1, None, by_length, rehearsal=rehearsal)
    light, full = steps.rehearse(0, n_trained=8)[0]
    kept = light["targets"] >= 0
    assert kept.any() and torch.allclose(light["weights"][kept], 0.25 * full["weights"][kept])


# ---------------------------------------------------------------------------------------------------------------------
# Engine and trainer


@pytest.mark.parametrize("dtype, mean, largest", [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-3, 1e-2)])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 5}], ids=["whole", "truncated"])
def test_the_engine_and_the_training_pass_agree(dtype, mean, largest, sampling):
    """Both tell the network's own distribution, whatever part of it an answer was drawn from.

    bf16 rounds to three digits, so its gap grows with the logits; these are small.
    """
    network = model()
    with torch.no_grad():
        network.head_weight.mul_(0.1 if dtype == torch.bfloat16 else 1.0)
    network.compute_dtype = dtype
    batch = next(iter(group_steps(network, prompts_per_step=4, samples_per_prompt=4, **sampling)))
    numbers = numbers_of(module_of(network), batch)
    assert numbers["logprob_gap"] <= mean and numbers["logprob_gap_max"] <= largest
    assert numbers["ess"] == pytest.approx(1.0, abs=0.01)
    with torch.no_grad():  # weights that the answers do not come from
        network.head_weight.mul_(0.5)
    assert numbers_of(module_of(network), batch)["logprob_gap"] > 10 * mean


def test_auto_takes_a_number_format_in_which_both_agree():
    """On a CPU that is fp32, on questions of no known form too: bf16 misses the bound where logits are large."""
    gaps = []
    for dtype in (resolve_compute_dtype("auto", "cpu", draws_answers=True), torch.bfloat16):
        network = model()
        network.compute_dtype = dtype
        numbers = numbers_of(module_of(network), next(iter(group_steps(network, samples_per_prompt=4))))
        gaps.append(numbers["logprob_gap"])
    assert gaps[0] <= 1e-5 and gaps[1] > 1e-3


def test_the_parent_and_the_old_weights_go_with_the_batch():
    network, parent = model(), model()
    steps = group_steps(network, kl=0.1, loss="dapo", updates_per_rollout=2)
    with torch.no_grad():  # one step away from the parent
        network.head_weight.mul_(0.9)
    batch = next(iter(steps))
    assert sum(len(micro["inputs"]) for micro in batch["micro"]) == 6  # with a KL term every answer is trained on
    for micro in batch["micro"]:
        inputs, targets = micro["inputs"], micro["targets"]
        old = objectives.token_logprobs(network, inputs, targets)
        assert torch.equal(micro["logprobs_old"], old.detach()) and not micro["logprobs_old"].requires_grad
        torch.testing.assert_close(micro["logprobs_ref"], objectives.token_logprobs(parent, inputs, targets).detach())
    module = module_of(network, steps.stage)
    numbers = numbers_of(module, batch)
    assert numbers["kl"] > 1e-4 and numbers["clip_low"] == numbers["clip_high"] == 0
    with torch.no_grad():
        network.head_weight.mul_(1.5)
    assert numbers_of(module, batch)["clip_high"] > 0


@pytest.mark.parametrize("loss", ["dapo", "ipo_rl"])
def test_a_loss_has_the_bounds_of_the_stage_and_the_ratio_that_is_its_own(loss):
    """Compares with the formula: ipo_rl's ratio is to what the engine drew from, those of others to the old weights."""
    ids, masks, advantages, engine = random_answers()
    (micro,) = micro_batches_of(ids, masks, 8, advantages=advantages, logprobs_engine=engine)
    network, mask = net(), micro["targets"] >= 0
    logprobs = objectives.token_logprobs(network, micro["inputs"], micro["targets"]).detach()
    moved = 0.2 * (-1.0) ** torch.arange(mask.size(1))
    micro |= {"logprobs_old": logprobs + moved, "logprobs_engine": logprobs - 2 * moved}
    others = micro["logprobs_engine" if loss == "ipo_rl" else "logprobs_old"]
    bounds = (0.001, 0.004) if loss == "ipo_rl" else (0.1, 0.3)
    formula = objectives.POLICY_LOSSES[loss]
    losses, low, high = formula(logprobs, others, micro["advantages"], mask, *bounds)
    stage = settings(loss=loss, clip_low=bounds[0], clip_high=bounds[1])
    total, sums = PolicyObjective(stage)(network, micro)
    torch.testing.assert_close(total, formula.total(losses, mask))
    assert (sums["clip_low"], sums["clip_high"]) == (low.sum(), high.sum())
    assert sums["clip_low"] != sums["clip_high"]


@pytest.mark.parametrize("name", objectives.POLICY_LOSSES)
def test_every_loss_counts_a_step_by_its_own_unit(name):
    steps = group_steps(score=all_different, loss=name)
    batch = next(iter(steps))
    sampled = sum(int((micro["targets"] >= 0).sum()) for micro in batch["micro"])
    wanted = {"tokens": sampled, "sequences": 6, "places": 6 * 6}[objectives.POLICY_LOSSES[name].unit]
    assert batch["n_trained"] == wanted


# ---------------------------------------------------------------------------------------------------------------------
# Questions, groups, positions


def test_questions_are_visited_once_per_epoch_and_position_restores(monkeypatch):
    monkeypatch.setattr("llm.stages.rollouts.render_prompt", lambda tokenizer, c: [int(c["messages"][0]["content"])])
    engine = SimpleNamespace(net=SimpleNamespace(config=CONFIG), tokenizer=None)

    def loader(position=None, **changes):
        return RolloutSteps(engine, Task(), settings(**changes), 2, 1, position, by_length)

    order = np.array([loader().questions.take(2)] + [loader({"step": s}).questions.take(2) for s in range(1, 5)])
    order = order.flatten().tolist()
    assert sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4] and order[:5] != order[5:]
    skipped = loader()
    skipped.skip(3)
    assert skipped.step == 3 and skipped.questions.take(4) == order[6:]
    assert loader({"step": 4}, updates_per_rollout=2).questions.take(2) == order[4:6]  # two rollouts are behind it
    with pytest.raises(UserError, match="stage.prompts_per_step=9"):
        loader(prompts_per_step=9)


def test_another_seed_asks_in_another_order():
    orders = [Questions(range(20), seed).take(20) for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1] and sorted(orders[1]) == list(range(20))


def test_solved_questions_wait_longer_and_longer():
    order = Questions(range(4), seed=1, skip_solved=True)
    asked = []
    for _ in range(40):
        (question,) = order.take(1)
        asked.append(question)
        order.learn([(question, question == 2)])
        order = Questions(range(4), 1, True, copy.deepcopy(order.state_dict()))  # a resume at any time
    epochs = [order.order(epoch) for epoch in range(20)]
    found = [i for i, question in enumerate(asked) if question == 2]
    assert len(found) == 4 and all(asked.count(question) >= 11 for question in (0, 1, 3)) and len(epochs) == 20
    assert [later - earlier > 3 for earlier, later in zip(found, found[1:], strict=False)] == [True] * 3
    every = Questions(range(3), seed=1, skip_solved=True)
    every.learn([(question, True) for question in every.take(3)])
    assert sorted(every.take(3)) == [0, 1, 2]  # a whole epoch is solved: it is asked all the same
    plain = Questions(range(3), seed=1)
    plain.learn([(0, True)])
    assert plain.state_dict() == {"asked": 0}


def scores_of(*steps):
    """A score that gives these rewards call after call, then zeros."""
    calls = iter(steps)
    return lambda asked, answers: torch.tensor(next(calls, [0.0] * len(answers)))


def test_groups_without_a_signal_are_kept_dropped_or_drawn_again():
    first, second = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0]
    kept, dropped = (next(iter(group_steps(score=scores_of(first), filter_equal=how))) for how in (None, "drop"))
    assert kept["n_trained"] > dropped["n_trained"] and kept["metrics"] == pytest.approx(
        dropped["metrics"] | {"rollout_tok_per_s": kept["metrics"]["rollout_tok_per_s"]}
    )
    assert [m["inputs"].tolist() for m in kept["micro"]] == [m["inputs"].tolist() for m in dropped["micro"]]
    steps = group_steps(score=scores_of(first, second), filter_equal="resample")
    batch = next(iter(steps))
    assert sum(len(m["inputs"]) for m in batch["micro"]) == 6 and steps.questions.asked == 3
    assert batch["state"]["questions"] == {"asked": 3} and batch["metrics"]["mixed_groups"] == pytest.approx(2 / 3)
    steps = group_steps(score=scores_of(), filter_equal="resample")
    batch = next(iter(steps))
    assert steps.questions.asked == 2 * (1 + 3) and batch["n_trained"] == 1 and batch["metrics"]["no_signal"] == 1
    assert len(batch["micro"]) == 1 and not (batch["micro"][0]["targets"] >= 0).any()
    ids = [sorted(map(str, (g.answers[0].ids for g in steps.ask([0], 0, attempt)))) for attempt in (0, 1, 0)]
    assert ids[0] == ids[2] != ids[1]


def test_every_try_of_a_step_draws_anew(monkeypatch):
    """Counts the tries: a question that a small task asks twice in a step would get equal answers from equal ones."""
    attempts, ask = [], GroupSteps.ask

    def counted(self, questions, step, attempt=0):
        attempts.append(attempt)
        return ask(self, questions, step, attempt)

    monkeypatch.setattr(GroupSteps, "ask", counted)
    next(iter(group_steps(score=scores_of(), filter_equal="resample")))
    assert attempts == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "number"), [({}, 3), ({"top_k": 1}, 1), ({"temperature": 0.0}, 1), ({"max_new_tokens": 1}, None)]
)
def test_answers_are_drawn_as_the_stage_says(changes, number):
    (group,) = group_steps(**changes).ask([0], 0)
    if number is None:
        assert {answer.length for answer in group.answers} <= {0, 1}
    else:
        assert len({tuple(answer.ids) for answer in group.answers}) == number


def test_draws_hang_on_the_seed_the_step_and_the_rank(monkeypatch):
    """Asks one question: in another epoch, by another run or on another process, it has other answers."""

    def drawn(step=0, seed=1, rank=0):
        monkeypatch.setattr("llm.stages.rollouts.collectives.rank", lambda: rank)
        steps = group_steps()
        steps.seed = seed
        return tuple(tuple(answer.ids) for answer in steps.ask([0], step)[0].answers)

    different = {drawn(), drawn(step=1), drawn(seed=2), drawn(rank=1), drawn(step=1, seed=2)}
    assert len(different) == 5 and drawn() in different


def test_the_room_of_an_answer_ends_with_the_context():
    steps = group_steps(max_new_tokens=30, overlong=10)
    (group,) = steps.ask([0], 0)
    room = 24 - len(steps.prompts[0])
    assert room < 30 and {answer.room for answer in group.answers} == {room}
    penalties = [min(0.0, (room - 10 - answer.length) / 10) for answer in group.answers]
    assert (group.rewards - group.scores).tolist() == pytest.approx(penalties) and min(penalties) < 0


def test_the_numbers_of_a_step_are_those_of_its_answers():
    """Computes them by hand, for two answers: one that ended, with a token of a tool, and one that was cut."""
    ended = Answer([1, 2, 7, 8, 9], [0, 0, 1, 0, 1], [0.0, 0.0, -1.0, 0.0, -0.5], True, 2, 6)
    cut = Answer([1, 2, 5, 5, 5, 5], [0, 0, 1, 1, 1, 1], [0.0, 0.0, -2.0, -1.0, -1.0, -0.5], False, 4, 4)
    scores = torch.tensor([1.0, 0.0])
    steps = group_steps()
    steps.seconds["rollout"] = 2.0
    numbers = steps.answer_metrics([Group(0, [ended, cut], scores, scores)])
    assert numbers["response_len"] == 3 and numbers["finished"] == numbers["truncated"] == 0.5
    assert numbers["entropy"] == pytest.approx(6 / 6) and numbers["rollout_tok_per_s"] == pytest.approx(6 / 2)
    assert (numbers["reward"], numbers["reward_std"]) == (0.5, 0.5)


class HeldOut(Task):
    """Questions of a task that replies to answers; none has a rule by which free answers are judged."""

    reply = None

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))


@pytest.mark.parametrize("turns", [1, 2])
def test_held_out_questions_are_answered_as_the_rollouts_are(turns):
    lines = ("temperature=0.7", "top_k=5", "max_new_tokens=9", "eval_samples=3", "eval_examples=4", f"turns={turns}")
    lines = (*(f"stage.{line}" for line in lines), "stage.prompts_per_step=2", "stage.eval_every=6", "seed=7")
    cfg = compose("train", "experiment=tiny", "stage=grpo", *lines)
    test = HeldOut()
    found = evaluations(cfg, model(), TOKENIZER, SimpleNamespace(test=test, parent=None))[0]
    assert found.params == SamplingParams(0.7, 5, max_new_tokens=9, seed=7) and found.every == 6
    assert (found.task, found.num_samples, found.max_items, found.batch_size) == (test, 3, 4, 2)
    assert (found.draw is draw_answers) == (turns == 1)


def test_long_answers_are_rewarded_less():
    steps = group_steps(score=scores_of([1.0] * 6), overlong=4)
    for group in steps.ask([0, 1], 0):
        assert group.scores.tolist() == [1.0] * 3
        for answer, reward in zip(group.answers, group.rewards.tolist(), strict=True):
            assert reward == pytest.approx(1.0 - max(answer.length - 2, 0) / 4) and answer.room == 6


class Several:
    """A score of several rewards, whose numbers of every answer are the same, or come from a list."""

    def __init__(self, weights: dict[str, float], *rows):
        self.names, self.weights = list(weights), torch.tensor(list(weights.values()))
        self.full, self.rows = sum(max(weight, 0.0) for weight in weights.values()), rows

    def __call__(self, conversations, completions) -> torch.Tensor:
        return torch.tensor([self.rows[i % len(self.rows)] for i in range(len(completions))])


@pytest.mark.parametrize("weights", [(1.0, 0.2), (0.2, 1.0), (-0.2, 1.0)])
def test_the_penalty_of_long_answers_is_the_same_whatever_the_weights_are(weights):
    score = Several(dict(zip(("number", "length"), weights, strict=True)), [1.0, 1.0])
    steps = group_steps(score=score, overlong=4)
    groups = steps.ask([0, 1], 0)
    for group, totals in zip(groups, steps.totals(groups), strict=True):
        assert group.scores.tolist() == [[1.0, 1.0]] * 3 and group.rewards.shape == (3, 3)
        wanted = [sum(weights) - max(answer.length - 2, 0) / 4 for answer in group.answers]
        assert totals.tolist() == pytest.approx(wanted) and min(wanted) < sum(weights)


def test_a_reward_without_weight_gives_no_signal():
    rows = [[0.0, 0.0], [0.0, 5.0], [0.0, 2.0]]
    for advantage, weights, mixed in (
        ("centred", (1.0, 0.0), 0),
        ("gdpo", (1.0, 0.0), 0),
        ("centred", (1.0, 1.0), 1),
        ("gdpo", (1.0, 1.0), 1),
    ):
        score = Several(dict(zip(("task", "length"), weights, strict=True)), *rows)
        batch = next(iter(group_steps(score=score, advantage=advantage, filter_equal="drop")))
        assert (batch["metrics"]["mixed_groups"], batch["metrics"]["no_signal"]) == (mixed, 1 - mixed)
    trade = Several({"number": 1.0, "length": 1.0}, [1.0, 0.0], [0.0, 1.0], [1.0, 0.0])  # equal in total
    for advantage, mixed in (("centred", 0), ("gdpo", 1)):
        batch = next(iter(group_steps(score=trade, advantage=advantage)))
        assert batch["metrics"]["mixed_groups"] == mixed


@pytest.mark.parametrize(
    "weights, row, is_solved",
    [
        ({"task": 1.0, "length": 1.0}, [0.0, 1.0], False),
        ({"task": 0.5, "length": 0.2}, [1.0, 0.0], True),
        ({"number": 0.7, "length": 0.3}, [1.0, 1.0], True),
        ({"number": 0.7, "length": 0.3}, [1.0, 0.9], False),
        ({"number": 1.0, "length": -1.0}, [1.0, 0.0], True),
    ],
)
def test_an_answer_is_right_by_its_task_or_by_all_its_rewards(weights, row, is_solved):
    steps = group_steps(score=Several(weights, row), curriculum="pass_rate")
    next(iter(steps))
    assert len(steps.questions.solved) == (2 if is_solved else 0)


def test_a_rollout_serves_several_updates_and_goes_on_after_a_kill():
    network = model()
    straight = iter(group_steps(network, loss="dapo", updates_per_rollout=3))
    batches = []
    for _ in range(5):
        batches.append(next(straight))
        with torch.no_grad():  # an optimizer step
            network.head_weight.mul_(0.99)
    assert same(batches[0], batches[1]) and same(batches[0], batches[2]) and not same(batches[2], batches[3])
    assert ["rollout" in batch["state"] for batch in batches] == [True, True, False, True, True]
    assert batches[0]["seconds"]["rollout"] > 0 == batches[1]["seconds"]["rollout"]
    resumed = iter(group_steps(model(1), batches[0]["state"], loss="dapo", updates_per_rollout=3))  # other weights
    assert same(next(resumed), batches[1])
    later = model()
    with torch.no_grad():
        for _ in range(3):
            later.head_weight.mul_(0.99)
    resumed = iter(group_steps(later, batches[2]["state"], loss="dapo", updates_per_rollout=3))
    fourth = next(resumed)
    assert same(fourth, batches[3]) and fourth["state"]["step"] == 4


def test_a_rollout_is_dealt_out_anew_to_another_number_of_processes():
    states = []
    for seed in (1, 2):
        steps = group_steps(model(seed), score=all_different, loss="dapo", updates_per_rollout=2)
        steps.rows_per_micro = 2
        states.append(next(iter(steps))["state"])
    whole = [micro for state in states for micro in state["rollout"]["micro"]]
    for world in (1, 3, 8):
        moved = [state["rollout"] for state in positions_for(states, world)]
        found = [micro for one in moved for micro in one["micro"] if (micro["targets"] >= 0).any()]
        assert len(found) == len(whole) == 6 and all(one["micro"] for one in moved)
        assert {id(micro) for micro in found} == {id(micro) for micro in whole}
        for name in ("n_trained", "n_tokens"):
            assert sum(one[name] for one in moved) == sum(state["rollout"][name] for state in states)
    assert positions_for([{"step": 3}, {"step": 3}], 3) == [{"step": 3}] * 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"clip_high": 0.3}, "stage.clip_high=0.3: stage.loss=reinforce clips nothing"),
        ({"loss": "sapo", "clip_low": 0.3}, "stage.clip_low=0.3: stage.loss=sapo clips nothing"),
        ({"updates_per_rollout": 2}, "stage.updates_per_rollout=2: stage.loss=reinforce takes answers"),
        ({"loss": "ipo_rl", "correction": "icepop"}, "stage.correction=icepop: stage.loss=ipo_rl corrects by itself"),
        ({"overlong": 6}, "stage.overlong=6: must be smaller than stage.max_new_tokens=6"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    stage = compose("train", "stage=grpo", "stage.max_new_tokens=6", *(f"stage.{k}={v}" for k, v in changes.items()))
    with pytest.raises(UserError, match=message):
        check_policy(stage.stage)


def test_a_run_from_before_the_keys_is_one_with_their_defaults():
    new = OmegaConf.to_container(compose("train", "stage=grpo").stage)
    old = {key: value for key, value in new.items() if f"stage.{key}" not in BEFORE_KEYS}
    assert len(old) == len(new) - sum(key.startswith("stage.") for key in CHANGED_KEYS)
    assert diff_configs({"stage": old}, {"stage": new}) == []
    assert diff_configs({"stage": old}, {"stage": new | {"kl": 0.1}}) == [("stage.kl", 0.0, 0.1)]


def test_the_schema_names_what_there_is():
    assert set(stage_schema.POLICY_LOSSES) == set(objectives.POLICY_LOSSES)
    assert set(stage_schema.ADVANTAGES) == {*objectives.ADVANTAGES, "gdpo"}
    assert stage_schema.CORRECTIONS == objectives.CORRECTIONS


def test_shares_of_the_time_of_a_step(tmp_path, monkeypatch):
    """On a clock that moves in the loader (rollout 3 s, forward 1 s, making the batch 1 s) and in the step (5 s)."""
    now = [0.0]
    for name in ("throughput", "cadence", "step_times"):
        monkeypatch.setattr(f"callbacks.{name}.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Clocked(StepModule):
        def training_step(self, batch, batch_idx):
            now[0] += 5.0
            super().training_step(batch, batch_idx)

    def slow(step):
        now[0] += 5.0
        return step_batch(step) | {"seconds": {"rollout": 3.0, "forward": 1.0}}

    module = Clocked(net(), OPTIM, STAGE, StageContext("grpo", None, torch.ones(70), STEPS, 8))
    fit(tmp_path, slow, module=module, extra=[StepTimes()])
    for row in rows(tmp_path):
        shares = [float(row[name]) for name in ("rollout_share", "update_share", "rest_share")]
        assert shares == pytest.approx([0.3, 0.6, 0.1]) and math.isclose(float(row["update_tok_per_s"]), 32 / 5)
