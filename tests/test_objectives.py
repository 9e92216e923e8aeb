"""Objectives of post-training: hand-computed numbers, loops over single tokens in float64, directions and clipping."""

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from small_training import net, step_batch

from llm import objectives as o

ROWS, T = 4, 5


def case(seed=0, spread=0.6):
    """Log-probabilities old and new, advantages and a mask (4, 5) in float64; the last row counts nowhere."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(ROWS, T, generator=g, dtype=torch.float64) - 0.1
    new = (old + spread * torch.randn(ROWS, T, generator=g, dtype=torch.float64)).clamp(max=-0.01)
    advantages = torch.tensor([[1.5], [-0.5], [0.7], [-1.0]], dtype=torch.float64).expand(ROWS, T)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    return new.requires_grad_(), old, advantages, mask


def test_logprobs_of_tokens_are_those_of_the_whole_distribution_and_have_its_gradient():
    model, micro = net(), step_batch(0)["micro"][0]
    inputs, targets = micro["inputs"], micro["targets"]
    factors = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))

    def gradients(logprobs):
        model.zero_grad()
        (logprobs * factors).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    got = o.token_logprobs(model, inputs, targets)
    plain = model(inputs).log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    wanted = plain.masked_fill(targets < 0, 0.0)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    for a, b in zip(gradients(got), gradients(wanted), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_kl_estimators_by_hand():
    logprobs, ref = torch.tensor([[math.log(0.5), 0.0]]), torch.tensor([[math.log(0.25), math.nan]])
    mask = torch.tensor([[True, False]])
    wanted = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 0.5 - math.log(0.5) - 1}
    assert set(wanted) == set(o.KL)
    for name, value in wanted.items():
        torch.testing.assert_close(o.KL[name](logprobs, ref, mask), torch.tensor([[value, 0.0]]))
    assert (o.kl_k3(torch.randn(1, 99), torch.randn(1, 99), torch.ones(1, 99).bool()) >= 0).all()


REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    "name, first",
    [
        ("centred", [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ("max_rl", [3.0, -1.0, -1.0, -1.0]),
        ("zscore", [1.5 / 1.0002, -0.5 / 1.0002, -0.5 / 1.0002, -0.5 / 1.0002]),  # std 0.5
    ],
)
def test_advantages_by_hand_and_none_where_rewards_are_equal(name, first):
    got = o.group_advantages(name, REWARDS)
    torch.testing.assert_close(got, torch.tensor([first, [0.0] * 4, [0.0] * 4]))
    assert not o.group_advantages(name, torch.tensor([[0.7], [0.0]])).any()  # groups of one
    parts, weights = torch.stack([REWARDS, torch.rand(3, 4)], dim=-1), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(o.group_advantages(name, parts, weights), got)


def test_gdpo_gives_every_reward_its_say():
    """One reward of 0/1 and one of 0/0.01: summed first, the small one would vanish."""
    parts = torch.tensor([[[1.0, 0.0], [0.0, 0.01], [0.0, 0.0], [1.0, 0.01]]], dtype=torch.float64)
    got = o.group_advantages("gdpo", parts, torch.tensor([1.0, 2.0], dtype=torch.float64))
    single = [0.5 / (3**-0.5 + 1e-4), 0.005 / (0.01 * 3**-0.5 + 1e-4)]
    total = [single[0] - 2 * single[1], -single[0] + 2 * single[1], -single[0] - 2 * single[1]]
    total.append(-total[2])
    spread = (sum(x * x for x in total) / 3) ** 0.5 + 1e-4
    torch.testing.assert_close(got, torch.tensor([[x / spread for x in total]], dtype=torch.float64))
    assert not o.group_advantages("gdpo", torch.ones(2, 3)).any()
    assert not o.group_advantages("gdpo", torch.ones(1, 1)).any()
    beside = o.group_advantages("gdpo", torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.7, 0.3], [0.2, 0.9, 0.4]]))
    assert not beside[0].any() and beside[1:].all()


@pytest.mark.parametrize("name", [*o.ADVANTAGES, "gdpo"])
@pytest.mark.parametrize("group", [6, 12, 16])
def test_equal_rewards_have_no_advantage_at_all(name, group):
    rewards = torch.tensor([0.2, 0.7, 1.2])[:, None].expand(3, group)  # numbers whose mean is rounded
    assert not o.group_advantages(name, rewards).any()
    assert not o.group_advantages(name, torch.stack((rewards, 0 * rewards), -1), torch.tensor([0.7, 0.3])).any()


def test_overlong_answers_lose_up_to_one():
    lengths = torch.tensor([10.0, 16.0, 18.0, 20.0, 25.0])
    assert o.overlong_penalty(lengths, torch.tensor(20.0), 4).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert not o.overlong_penalty(lengths, torch.tensor(20.0), 0).any()


def test_gae_by_hand_and_steps_over_tokens_of_a_tool():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.75]])
    every = torch.ones(1, 3).bool()
    deltas = [0.9 * 0.25 - 0.5, 0.9 * 0.75 - 0.25, 1.0 - 0.75]
    wanted = [0.0, 0.0, deltas[2]]
    wanted[1] = deltas[1] + 0.9 * 0.8 * wanted[2]
    wanted[0] = deltas[0] + 0.9 * 0.8 * wanted[1]
    got, returns = o.gae(rewards, values, every, 0.9, 0.8)
    torch.testing.assert_close(got, torch.tensor([wanted]))
    torch.testing.assert_close(returns, got + values)
    apart = torch.tensor([[True, False, True, True, False]])
    rewards, values = (torch.tensor([[x[0], math.nan, *x[1:], math.inf]]) for x in (rewards[0], values[0]))
    torch.testing.assert_close(o.gae(rewards, values, apart, 0.9, 0.8)[0][apart], got[0])
    reward_to_go, _ = o.gae(torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 3), every, 1.0, 1.0)
    assert reward_to_go.tolist() == [[6.0, 5.0, 3.0]]


def test_whitening_ignores_masked_numbers():
    values = torch.tensor([[1.0, 2.0, math.nan], [3.0, math.inf, 6.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    flat = values[mask]
    torch.testing.assert_close(o.whiten(values, mask)[mask], (flat - flat.mean()) / flat.std(), atol=1e-5, rtol=0)
    assert o.whiten(values, mask)[~mask].tolist() == [0.0, 0.0]
    torch.testing.assert_close(o.whiten(values, mask, shift=False)[mask].mean(), flat.mean())
    assert not o.whiten(values, torch.zeros_like(mask)).any()


def test_processes_whiten_their_values_together():
    values, mask = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) + 3, torch.ones(4, 6).bool()
    mask[1, 2:], mask[3] = False, False
    given, met = [], Barrier(2, timeout=60)

    def add_up(numbers):
        given.append(numbers)
        met.wait()
        total = [sum(pair) for pair in zip(*given[-2:], strict=True)]
        met.wait()
        return total

    def whiten(rows):
        return o.whiten(values[rows], mask[rows], add_up=add_up)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(whiten, (slice(0, 1), slice(1, 4))))
    torch.testing.assert_close(torch.cat(parts), o.whiten(values, mask))


def test_corrections_by_hand():
    engine = torch.zeros(2, 3)
    ratios = torch.tensor([[1.5, 4.0, 0.1], [2.0, 1.4, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    weights = {name: o.correction_weights(name, ratios.log(), engine, mask)[mask] for name in o.CORRECTIONS}
    assert weights["none"].tolist() == [1.0] * 5
    torch.testing.assert_close(weights["token_tis"], torch.tensor([1.5, 2.0, 0.1, 2.0, 1.4]))
    torch.testing.assert_close(weights["icepop"], torch.tensor([1.5, 4.0, 0.0, 2.0, 1.4]))
    torch.testing.assert_close(weights["sequence_mask"], torch.tensor([0.6, 0.6, 0.6, 2.8, 2.8]))
    above = o.correction_weights("sequence_mask", (1.1 * ratios).log(), engine, mask)
    assert above[1].tolist() == [0.0] * 3 and above[0, 0] > 0
    assert o.effective_share(4.0, 4.0, 4) == 1.0 and o.effective_share(1.0, 1.0, 4) == 0.25
    assert o.effective_share(0.0, 0.0, 4) == 0.0


def slow_loss(name, new, old, advantages, mask, limit):
    """Return the mean loss of a step and how many tokens were clipped, token by token in Python's floats."""
    total, clipped, n_tokens = 0.0, 0, int(mask.sum())
    low, high = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}.get(name, (0, 0))
    for row in range(len(mask)):
        places = [t for t in range(mask.size(1)) if mask[row, t]]
        mean = sum(new[row, t].item() - old[row, t].item() for t in places) / max(len(places), 1)
        row_loss = 0.0
        for t in places:
            p, q, a = math.exp(new[row, t].item()), math.exp(old[row, t].item()), advantages[row, t].item()
            r = math.exp(mean) if name == "gspo" else p / q
            if name == "reinforce":
                loss = -a * math.log(p)
            elif name == "cispo":
                loss = -min(r, 5.0) * a * math.log(p)
                clipped += r > 5.0
            elif name == "sapo":
                tau = 1.0 if a > 0 else 1.05
                loss = -a * 4 / tau / (1 + math.exp(-tau * (r - 1)))
            elif name == "ipo_rl":
                loss = -a * r if abs(p - q) <= 0.3 else 0.0
                clipped += abs(p - q) > 0.3
            else:
                inside = min(max(r, 1 - low), 1 + high)
                loss = -min(r * a, inside * a)
                clipped += inside * a < r * a
            row_loss += loss
        total += row_loss / max(len(places), 1) if name in ("grpo", "gspo", "sapo") else row_loss
    unit = {"grpo": len(mask), "gspo": len(mask), "sapo": len(mask), "dr_grpo": len(mask) * limit}.get(name, n_tokens)
    return total / unit, clipped


@pytest.mark.parametrize("name", o.POLICY_LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_policy_losses_are_those_of_single_tokens(name, seed):
    new, old, advantages, mask = case(seed)
    loss = o.POLICY_LOSSES[name]
    losses, low, high = loss(new, old, advantages, mask)
    got = loss.total(losses, mask) / loss.units(int(mask.sum()), len(mask), 8)
    wanted, clipped = slow_loss(name, new, old, advantages, mask, 8)
    assert got.item() == pytest.approx(wanted, abs=1e-12) and int((low | high).sum()) == clipped
    assert not (low & high).any() and not ((low | high) & ~mask).any()


@pytest.mark.parametrize("name", o.POLICY_LOSSES)
def test_a_step_down_the_gradient_favours_better_answers_and_nothing_masked(name):
    """At the old weights the gradient of a token's loss is -A over its unit; what is masked may be anything."""
    new, old, advantages, mask = case(spread=0.0)
    loss = o.POLICY_LOSSES[name]
    broken = [x.detach().masked_fill(~mask, bad) for x, bad in ((new, math.nan), (old, -math.inf))]
    broken[0].requires_grad_()
    losses, _, _ = loss(*broken, advantages.masked_fill(~mask, math.nan), mask)
    loss.total(losses, mask).backward()
    grad = broken[0].grad
    size = mask.sum(1, keepdim=True).clamp(min=1) if loss.unit == "sequences" else 1
    torch.testing.assert_close(grad[mask], (-advantages / size)[mask])
    assert not grad[~mask].any() and losses.masked_select(mask).isfinite().all()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "ipo_rl"])
def test_clipped_tokens_have_no_gradient_and_harmful_ones_still_have(name):
    """One token per answer: it moved far in the direction of its advantage (0, 1), or against it (2, 3)."""
    old = torch.tensor([[0.3], [0.9], [0.9], [0.3]], dtype=torch.float64).log()
    new = torch.tensor([[0.9], [0.3], [0.3], [0.9]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    mask = torch.ones(4, 1).bool()
    losses, low, high = o.POLICY_LOSSES[name](new, old, advantages, mask)
    losses.sum().backward()
    against = name != "ipo_rl"  # which drops whatever moved far
    assert new.grad.flatten().bool().tolist() == [False, False, against, against]
    assert high.flatten().tolist() == [True, False, False, not against]
    assert low.flatten().tolist() == [False, True, not against, False]


def test_cispo_bounds_the_ratio_and_keeps_the_gradient():
    old, new = torch.tensor([[-3.0]]), torch.tensor([[-0.1]], requires_grad=True)
    losses, low, high = o.POLICY_LOSSES["cispo"](new, old, torch.ones(1, 1), torch.ones(1, 1).bool())
    losses.sum().backward()
    assert new.grad.item() == -5.0 and high.item() and not low.item()
    narrow, _, _ = o.POLICY_LOSSES["cispo"](new, old, torch.ones(1, 1), torch.ones(1, 1).bool(), clip_high=1.0)
    assert narrow.item() == pytest.approx(2.0 * 0.1)


def test_ratios_that_overflow_stay_finite():
    for name, loss in o.POLICY_LOSSES.items():
        new = torch.tensor([[-1.0, -1000.0]], requires_grad=True)
        losses, _, _ = loss(new, torch.tensor([[-1000.0, -1.0]]), torch.ones(1, 2), torch.ones(1, 2).bool())
        losses.sum().backward()
        assert losses.isfinite().all() and new.grad.isfinite().all(), name


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 0.1, math.nan]], requires_grad=True)
    old, returns = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    losses, clipped = o.value_loss(values, old, returns, mask)
    torch.testing.assert_close(losses, torch.tensor([[0.5 * 1.8**2, 0.5 * 0.9**2, 0.0]]))
    assert clipped.tolist() == [[True, False, False]]
    losses.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.9, 0.0]]))


# ----- distillation


def test_divergences_by_hand():
    student = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)  # 1/4 and 3/4
    teacher = torch.zeros(1, 2, dtype=torch.float64)
    wanted = {
        "reverse_kl": 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
        "forward_kl": 0.5 * math.log(2.0) + 0.5 * math.log(2 / 3),
    }
    for name, value in wanted.items():
        assert o.distillation_loss(student, teacher, name).item() == pytest.approx(value, abs=1e-12)
        assert o.distillation_loss(student, student + 5.0, name).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="no divergence of the name jeffreys"):
        o.distillation_loss(student, teacher, "jeffreys")


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_have_the_losses_and_the_gradient_of_all_logits_at_once(name, chunk):
    """Eleven tokens, of hidden sizes 3 and 5, over a vocabulary of 7; a loop over tokens and words in float64."""
    g = torch.Generator().manual_seed(0)
    hidden, theirs = torch.randn(11, 3, generator=g).double(), torch.randn(11, 5, generator=g).double()
    ours, other = torch.randn(7, 3, generator=g).double(), torch.randn(7, 5, generator=g).double()
    goals, factors = torch.randint(0, 7, (11,), generator=g), torch.randn(11, generator=g).double()
    largest = []

    def gradients(chunked: bool):
        x, w = hidden.clone().requires_grad_(), ours.clone().requires_grad_()

        def student(rows):
            largest.append(len(rows))
            return rows @ w.T

        if chunked:
            losses, logprobs = o.chunked_distillation(student, lambda y: y @ other.T, x, theirs, goals, name, chunk)
            assert not logprobs.requires_grad and max(largest) == min(chunk, 11)
            by_token = (hidden @ ours.T).log_softmax(1)[range(11), goals]
            torch.testing.assert_close(logprobs, by_token)
        else:
            p, q = student(x).softmax(1), (theirs @ other.T).softmax(1)
            a, b = (p, q) if name == "reverse_kl" else (q, p)
            losses = torch.stack([sum(a[i, v] * (a[i, v] / b[i, v]).log() for v in range(7)) for i in range(11)])
        (losses * factors).sum().backward()
        return losses.detach(), x.grad, w.grad

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_sampled_form_has_the_gradient_of_the_reverse_divergence_on_average():
    """The mean over all words, each as often as the student says it, is the gradient over the whole vocabulary."""
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 6, generator=g).double().log_softmax(1)
    logits = torch.randn(1, 6, generator=g).double().requires_grad_()
    logprobs = logits.log_softmax(1)
    losses, d = o.sampled_distillation(logprobs, teacher, torch.ones(1, 6).bool())
    (by_samples,) = torch.autograd.grad((logprobs.exp().detach() * losses).sum(), logits)
    (whole,) = torch.autograd.grad(o.distillation_loss(logits, teacher, "reverse_kl").sum(), logits)
    torch.testing.assert_close(by_samples, whole)
    assert not d.requires_grad and torch.equal(d, (logprobs - teacher).detach())
    masked, none = o.sampled_distillation(torch.full((1, 6), math.nan), teacher, torch.zeros(1, 6).bool())
    assert not masked.any() and not none.any()
