"""MuonAdamW against torch's optimizers and float64; schedules and scaling rules against known values."""

from types import SimpleNamespace

import pytest
import torch

from llm.errors import UserError
from llm.gpt import GPT, GPTConfig
from llm.optim import MuonAdamW, build_optimizer, orthogonalize
from llm.scaling import adam_lr_scale, micro_batches, model_config, pretrain_steps
from llm.schedules import lr_multiplier, muon_momentum


class Group(SimpleNamespace):
    """Stands in for a config group: attributes and items."""

    def __getitem__(self, key):
        return getattr(self, key)


def grads_for(params, seed):
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch(weight_decay):
    shapes = [(7, 5), (12,)]
    ours = [torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(1))) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    hyper = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": weight_decay}
    a, b = MuonAdamW([{"kind": "adamw", "params": ours, **hyper}]), torch.optim.AdamW(theirs, **hyper)
    for step in range(20):
        grads_for(ours, step)
        grads_for(theirs, step)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_muon_equals_torch(shape):
    """torch's Muon orthogonalises in bf16 and each matrix alone; ours in fp32 and stacked."""
    ours = [torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(s))) for s in range(3)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = MuonAdamW([{"kind": "muon", "params": ours, "lr": 0.02, "momentum": 0.95, "ns_steps": 5, "weight_decay": 0.1}])
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, ns_steps=5, weight_decay=0.1, adjust_lr_fn="original")
    for step in range(10):
        grads_for(ours, step)
        grads_for(theirs, step)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).norm() / (10 * 0.02 * min(shape) ** 0.5) < 0.03  # relative to the distance travelled


def test_orthogonalize_equals_a_float64_loop():
    x = torch.randn(5, 12, 20, generator=torch.Generator().manual_seed(0))
    for x_in in (x, x.mT.contiguous()):
        for got, g in zip(orthogonalize(x_in), x_in.double(), strict=True):
            tall = g.shape[0] > g.shape[1]
            y = (g.T if tall else g) / (g.norm() + 1e-7)
            for _ in range(5):
                s = y @ y.T
                y = 3.4445 * y + (-4.7750 * s + 2.0315 * s @ s) @ y
            torch.testing.assert_close(got.double(), y.T if tall else y, atol=1e-4, rtol=1e-4)
        singular = torch.linalg.svdvals(orthogonalize(x_in))
        assert singular.min() > 0.6 and singular.max() < 1.3


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="2-D"):
        MuonAdamW([{"kind": "muon", "params": [torch.nn.Parameter(torch.zeros(3))], "lr": 0.1}])


def tiny_net():
    return GPT(GPTConfig(2, 1, 1, 16, 16, 8, 70)).init_weights(0)


MUON = Group(
    name="muon_adamw",
    matrix_lr=0.02,
    embedding_lr=0.2,
    unembedding_lr=0.004,
    betas=[0.8, 0.95],
    eps=1e-10,
    weight_decay=0.0,
    momentum=0.95,
    ns_steps=5,
)


def test_groups_cover_every_parameter_once_with_the_reference_rates():
    net = tiny_net()
    groups = build_optimizer(net, MUON, lr_frac=0.5).param_groups
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in net.parameters())
    scale = 0.5 * (16 / 768) ** -0.5
    assert [g["lr"] for g in groups] == pytest.approx([0.004 * scale, 0.2 * scale, 0.01])
    assert [g["kind"] for g in groups] == ["adamw", "adamw", "muon"]


def test_state_survives_a_round_trip():
    """Two steps, save, load into a new optimizer, third step: bit for bit as without the break."""

    def run(break_at: int | None):
        net = tiny_net()
        opt = build_optimizer(net, MUON)
        for step in range(3):
            if step == break_at:
                state = opt.state_dict()
                opt = build_optimizer(net, MUON)
                opt.load_state_dict(state)
            grads_for(net.parameters(), step)
            opt.step()
        return net

    for a, b in zip(run(None).parameters(), run(2).parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("step", "want"), [(0, 0.1), (9, 1.0), (10, 1.0), (80, 1.0), (90, 0.55), (99, 0.145), (100, 0.1), (120, 0.1)]
)
def test_lr_schedule(step, want):
    assert lr_multiplier(step, 100, 0.1, 0.2, 0.1) == pytest.approx(want)


def test_lr_schedule_of_finetuning_falls_from_the_start():
    values = [lr_multiplier(s, 10, 0.0, 1.0, 0.0) for s in range(11)]
    assert values == pytest.approx([1 - s / 10 for s in range(11)])


def test_momentum_schedule():
    assert [muon_momentum(s, 300, 0.85, 0.95) for s in (0, 150, 300, 900)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert muon_momentum(0, 0, 0.85, 0.95) == 0.95


def shape(depth, **more):
    values = {"depth": depth, "aspect_ratio": 64, "head_dim": 128, "n_kv_head": None, "seq_len": 2048}
    return model_config(Group(**(values | more)), Group(name="classic", rope_base=10_000, softcap=15), 65_536)


def test_depth_sets_width_and_heads():
    assert [(shape(d).n_embd, shape(d).n_head) for d in (2, 4, 5, 20, 26)] == [
        (128, 1),
        (256, 2),
        (384, 3),
        (1280, 10),
        (1664, 13),
    ]
    with pytest.raises(UserError, match="n_kv_head=4"):
        shape(20, n_kv_head=4)
    with pytest.raises(UserError, match="model.depth=0"):
        shape(0)


@pytest.mark.parametrize(
    ("depth", "steps"),
    [(4, 1400), (6, 2325), (8, 3520), (10, 5075), (12, 7080), (16, 12_800), (20, 21_400), (24, 33_600)]
    + [(26, 41_275), (30, 60_225), (32, 71_680), (34, 84_575)],
)
def test_horizon_equals_the_published_steps(depth, steps):
    assert pretrain_steps(shape(depth), 524_288, 20.0, None) == steps


def test_horizon_from_flops():
    assert pretrain_steps(shape(20), 524_288, 20.0, 1e18) == round(1e18 / (3_491_758_080 * 524_288))
    with pytest.raises(UserError, match="stage.ratio"):
        pretrain_steps(shape(4), 10**12, 20.0, None)


def test_adam_scale_at_d20():
    assert adam_lr_scale(1280) == pytest.approx(0.774597, abs=1e-6)


def test_micro_batches():
    assert micro_batches(524_288, 32, 2048) == 8 and micro_batches(524_288, 32, 2048, world=8) == 1
    with pytest.raises(UserError, match=r"batch.total=5000.*set batch.total=4096 or 8192"):
        micro_batches(5000, 16, 256)
    with pytest.raises(UserError, match=r"batch.total=100.*set batch.total=4096"):
        micro_batches(100, 16, 256)
