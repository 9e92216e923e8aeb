"""Tables of n-grams: whose ids a hash reads, the gradient that lies in one place, and AdamW of the rows in use."""

import pytest
import torch
from conftest import compose

from llm.errors import UserError
from llm.model.config import GPTConfig, num_params
from llm.model.gpt import GPT
from llm.model.ngrams import NGrams, RowTable
from llm.optim.build import build_optimizer
from llm.optim.other_rules import row_adamw_update
from llm.scaling.rules import model_config
from llm.stages.text_plan import TextPlan, warnings_of

VOCAB, BOS = 70, 61
BETAS, EPS, LR, DECAY = (0.75, 0.95), 1e-10, 0.1, 0.5


def network(keeps: bool = False, **more) -> GPT:
    """A network of two layers with random weights; keeps: its tables keep their gradients."""
    options = {"arch": "modern", "value_embeds": True, "ngrams": (2, 3), "ngram_bos": BOS, **more}
    net, draw = GPT(GPTConfig(2, 2, 2, 16, 32, 64, VOCAB, **options)).init_weights(0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    for table in net.ngrams.tables.values():
        table.keeps_gradient = keeps
    return net


def drawn(*shape, seed=1) -> torch.Tensor:
    return torch.randint(0, BOS, shape, generator=torch.Generator().manual_seed(seed))


def test_in_a_packed_row_a_document_has_the_n_grams_that_it_has_alone():
    tables = network().ngrams
    first, second = drawn(1, 9), drawn(1, 12, seed=2)
    first[:, 0] = second[:, 0] = BOS
    packed = tables(torch.cat((first, second, second[:, :1], second), dim=1), None)
    alone = [tables(ids, None) for ids in (first, second, second[:, :1], second)]
    assert torch.equal(packed, torch.cat(alone, dim=1))
    other = first.clone()
    other[:, -1] += 1  # the token in front of the second document
    changed = tables(torch.cat((other, second), dim=1), None)
    assert torch.equal(changed[:, 9:], alone[1]) and not torch.equal(changed[:, 8], packed[:, 8])
    without = NGrams(GPTConfig(2, 2, 2, 16, 32, 64, VOCAB, arch="modern", ngrams=(2, 3)))  # no id begins a document
    without.load_state_dict(tables.state_dict())
    assert not torch.equal(without(torch.cat((other, second), dim=1), None)[:, 9], alone[1][:, 0])


def test_ids_in_front_of_a_row_count_as_if_they_stood_in_it():
    tables, ids = network().ngrams, drawn(2, 10)
    ids[0, 4] = BOS
    whole = tables(ids, None)
    for n in (1, 5, 6):
        before = torch.cat((torch.full((2, 2), VOCAB), ids[:, :n]), dim=1)[:, -2:]
        assert torch.equal(tables(ids[:, n:], before), whole[:, n:])


def test_few_n_grams_share_their_rows():
    """Ten thousand triples on 4 x 2,800 places: about as many share all four as at random, none."""
    tables = NGrams(GPTConfig(1, 2, 2, 16, 32, 64, 700, arch="modern", ngrams=(3,)))
    lines = torch.randint(0, 700, (1, 10_000, 3), generator=torch.Generator().manual_seed(3)).unique(dim=1)
    rows = tables.hashes(lines)[0]
    assert len(rows.unique(dim=0)) == len(rows)
    for part in range(4):  # each part is filled evenly: 3.6 n-grams a place
        counts = torch.bincount(rows[:, part] - part * tables.rows, minlength=tables.rows)
        assert counts.sum() == len(rows) and counts.max() < 16 and (counts == 0).float().mean() < 0.06


@pytest.mark.parametrize("into", ["residual", "values"])
def test_kept_gradients_are_those_of_autograd_and_lie_in_the_rows_used(into):
    plain, kept, ids = network(ngram_into=into), network(True, ngram_into=into), drawn(2, 31)
    for step in range(3):  # other rows in every step
        for micro in range(2):
            inputs = (ids + 7 * step + micro) % BOS
            for net in (plain, kept):
                net(inputs[:, :-1], inputs[:, 1:]).backward()
        used = {n: torch.cat(kept.ngrams.tables[str(n)].weight.grad.rows).unique() for n in (2, 3)}
        for (name, p), q in zip(plain.named_parameters(), kept.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, atol=1e-7, rtol=1e-5, msg=name)
        for n, rows in used.items():
            grad = plain.ngrams.tables[str(n)].weight.grad
            assert set(grad.any(1).nonzero().flatten().tolist()) <= set(rows.tolist()) and len(rows) < len(grad) / 2
        kept.zero_grad(), plain.zero_grad()
    with torch.no_grad():
        assert torch.equal(kept(ids), plain(ids))


def naive_adamw(weight, grads):
    """AdamW in float64, number by number, of steps in which a number has a gradient; bias by the steps of all."""
    out = weight.double().clone()
    for place in torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist():
        i, j = place
        w, m, v = out[i, j].item(), 0.0, 0.0
        for t, grad in enumerate(grads, 1):
            g = grad[i, j].item()
            if g:
                m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
                step = m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)) ** 0.5 + EPS)
                w = w * (1 - LR * DECAY) - LR * step
        out[i, j] = w
    return out


@pytest.mark.parametrize("named", [True, False])
def test_a_step_moves_what_has_a_gradient(named):
    """By rows that the gradient names, and without names, as where it has travelled."""
    draw, group = torch.Generator().manual_seed(0), {"betas": BETAS, "eps": EPS, "lr": LR, "weight_decay": DECAY}
    weight = torch.randn(9, 4, generator=draw, dtype=torch.float64)
    start, grads, state = weight.clone(), [], {"step": torch.zeros(())}
    state |= {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
    for step in range(5):
        rows = torch.randint(0, 7, (4,), generator=draw)  # the last two are never used
        grad = torch.zeros_like(weight).index_add_(0, rows, torch.randn(4, 4, generator=draw, dtype=torch.float64))
        grad[:, step % 4] = 0
        grads.append(grad.clone())
        if named:
            grad.rows = [rows[:1], rows[1:]]
        row_adamw_update(group, [weight], [grad], [state])
    torch.testing.assert_close(weight, naive_adamw(start, grads), atol=1e-6, rtol=1e-6)
    assert torch.equal(weight[7:], start[7:]) and not state["exp_avg"][7:].any() and state["step"] == 5


@pytest.mark.parametrize("optim", ["muon_adamw", "adamw"])
def test_the_optimizer_updates_tables_alike_whether_gradients_are_kept_or_not(optim):
    keys, ids = compose("train", f"optim={optim}").optim, drawn(2, 21)
    nets = network(), network(True)
    optimizers = [build_optimizer(net, keys) for net in nets]
    for step in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            inputs = (ids + 9 * step) % BOS
            net(inputs[:, :-1], inputs[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, atol=2e-5, rtol=1e-4, msg=name)
    still = (network().ngrams.tables["2"].weight == nets[1].ngrams.tables["2"].weight).all(1).float().mean()
    assert 0.5 < still < 1


def goes_on(make, ids):
    """Train for four steps, and two and two with a saved state between; check that no bit differs. Return the network.

    make: a function that returns the network to begin with. ids: (B, T + 1), of which every step trains on others.
    """
    keys = compose("train").optim

    def steps(net, optimizer, first, last):
        for step in range(first, last):
            inputs = (ids + 2 * step) % BOS
            net(inputs[:, :-1], inputs[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, begun, resumed = make(), make(), make()
    steps(whole, build_optimizer(whole, keys), 0, 4)
    steps(begun, before := build_optimizer(begun, keys), 0, 2)
    resumed.load_state_dict(begun.state_dict())
    after = build_optimizer(resumed, keys)
    after.load_state_dict(before.state_dict())
    steps(resumed, after, 2, 4)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    return resumed


def test_a_training_that_goes_on_from_a_saved_state_is_equal_bit_by_bit():
    goes_on(lambda: network(True), drawn(2, 21))


def test_keys_of_the_tables_set_rate_betas_and_decay():
    lines = ("optim.ngram_lr=0.5", "optim.ngram_betas=[0.1,0.2]", "optim.ngram_decay=0.3")
    groups = build_optimizer(network(), compose("train", *lines).optim).param_groups
    (group,) = (group for group in groups if group["kind"] == "row_adamw")
    assert group["lr"] == pytest.approx(0.5 * (32 / 768) ** -0.5) and group["weight_decay"] == 0.3
    assert group["betas"] == (0.1, 0.2) and len(group["params"]) == 2 and group["name"] == "ngrams"


def test_keys_of_the_architecture_make_the_tables():
    def shape(*lines):
        cfg = compose("train", "model=d2", *lines)
        return model_config(cfg.model, cfg.arch, 300)

    assert "ngrams" not in num_params(shape()) and shape().ngram_bos is None
    made = shape("arch.ngrams=[2,3]", "arch.ngram_rows=5", "arch.ngram_into=values")
    assert made.ngrams == (2, 3) and made.ngram_bos == 291 and made.ngram_into == "values"
    assert num_params(made)["ngrams"] == 2 * 5 * 300 * 128
    assert sum(p.numel() for p in GPT(made).parameters()) == num_params(made)["total"]
    with pytest.raises(UserError, match=r"arch.ngrams=\[2, 2\]"):
        shape("arch.ngrams=[2,2]")
    with pytest.raises(UserError, match="set arch.value_embeds=true"):
        shape("arch.ngrams=[2]", "arch.ngram_into=values", "arch.value_embeds=false")


def test_large_tables_and_a_text_that_is_read_again_are_warned_of():
    cfg = compose("train", "arch.ngrams=[2]")
    assert warnings_of(cfg, TextPlan(1, "best_fit", 1000, 1.0), 10**6) == []
    assert warnings_of(cfg, TextPlan(1, "best_fit", 1000, 2.0), 250) == []
    (line,) = warnings_of(cfg, TextPlan(1, "best_fit", 1000, 2.0), 251)
    assert "arch.ngram_rows=4: the tables have 251 parameters" in line and "1,000 tokens" in line


def test_frozen_tables_give_no_gradient():
    table = RowTable(4, 2)
    table.keeps_gradient = True
    table.weight.data.fill_(1.0)
    table.weight.requires_grad_(False)
    assert not table(torch.tensor([1])).requires_grad and table.kept is None
