"""torch.compile: when it is used, that it changes no result, and what a failure says."""

import json
import math
import sys
import threading

import pytest
import torch
from conftest import REPO
from processes import run

from llm.errors import UserError
from llm.model.compile import TUNED, compile_training, decide
from llm.model.config import GPTConfig
from llm.model.cross_entropy import CHUNK_ELEMENTS
from llm.model.gpt import GPT
from llm.stages.ramps import short_windows, shorter_rows

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MODERN = {"value_embeds": True, "residual_scalars": True, "smear": True, "backout": True, "window_pattern": "SL"}


@pytest.mark.parametrize(
    ("choice", "stage", "device", "steps", "want"),
    [
        (False, "pretrain", GPU, 10_000, False),
        (True, "pretrain", CPU, 1, True),
        ("auto", "pretrain", CPU, 499, False),
        ("auto", "sft", CPU, 500, True),
        ("auto", "pretrain", GPU, 1, True),
        ("auto", "grpo", GPU, 10_000, False),
    ],
)
def test_what_is_compiled(choice, stage, device, steps, want, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    compiled, why = decide(choice, stage, device, steps)
    assert compiled is want and why


def test_orders_that_cannot_be_followed(monkeypatch):
    with pytest.raises(UserError, match="compile=0: choose one of"):
        decide(0, "pretrain", GPU, 10)
    with pytest.raises(UserError, match="compile=true: the shapes of stage=grpo"):
        decide(True, "grpo", GPU, 10)
    with pytest.raises(UserError, match="compile=maybe: choose one of auto, true, false"):
        decide("maybe", "pretrain", GPU, 10)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert decide("auto", "pretrain", CPU, 10_000) == (False, "there is no C++ compiler")
    assert decide("auto", "pretrain", GPU, 10_000) == (False, "there is no C compiler")
    with pytest.raises(UserError, match="compile=true: there is no C.. compiler"):
        decide(True, "pretrain", CPU, 10)


def network(bos_id=None) -> GPT:
    documents = {} if bos_id is None else {"bos_id": bos_id, "key_offset": True}
    net = GPT(GPTConfig(3, 2, 2, 16, 32, 256, 100, arch="modern", **documents, **MODERN)).init_weights(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    return net


@pytest.mark.parametrize("arch", ["modern", "classic", "gpt2"])
def test_no_gradient_is_lost_in_the_graph(arch):
    """Traced as for training, without the compiler behind it: torch 2.11 lost all gradients behind our norm."""
    torch._dynamo.reset()
    features = MODERN | {"copy_candidate": True, "copy_bos": 99} if arch == "modern" else {}
    eager, traced = (GPT(GPTConfig(2, 2, 2, 16, 32, 64, 100, arch=arch, **features)).init_weights(0) for _ in range(2))
    traced.training_forward_blocks = torch.compile(traced.forward_blocks, backend="eager", dynamic=False)
    ids = torch.randint(0, 100, (2, 65), generator=torch.Generator().manual_seed(0))
    for net in (eager, traced):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
        net(ids[:, :-1], ids[:, 1:]).backward()
    for (name, p), q in zip(eager.named_parameters(), traced.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("by_block", [False, True])
def test_products_are_tuned_where_asked_by_options_that_torch_has(by_block, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda function, **more: given.append((function.__name__, more)) or function)
    for tuned in (False, True):
        compile_training(network(), by_block, tuned)
    blocks = ["forward"] * 3 if by_block else ["forward_blocks"]
    assert [name for name, _ in given] == 2 * [*blocks, "fused_chunk_loss"]
    options = [more.get("options") for _, more in given]
    assert options == [*[None] * (len(blocks) + 1), *[TUNED] * len(blocks), None]
    defaults = torch._inductor.config.get_config_copy()
    assert [name for name, value in TUNED.items() if defaults[name] != value][:1] == ["max_autotune_gemm"]


# 99: documents apart. Tuned, a CPU has one form of each product only.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("bos_id", "by_block", "tuned"),
    [(None, False, False), (99, False, False), (None, True, False), (None, False, True)],
)
def test_compiled_equals_eager_and_is_compiled_once(bos_id, by_block, tuned, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", (1 << 24, 25_600))  # tiles of 256 tokens
    torch._dynamo.reset()
    eager, compiled = network(bos_id), network(bos_id)
    compile_training(compiled, by_block, tuned)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    torch._dynamo.utils.counters.clear()
    for step in range(3):
        ids = torch.randint(0, 100, (2, 257), generator=torch.Generator().manual_seed(step))
        targets = ids[:, 1:].clone()
        targets[0, : 3 * step] = -1  # their number changes: the tile that is left over must not be compiled
        for net in (eager, compiled):
            net.zero_grad()
            (net(ids[:, :-1], targets, reduction="sum") / 512).backward()
        for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)
        if step == 0:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    with torch.no_grad():
        torch.testing.assert_close(eager(ids[:, :9]), compiled(ids[:, :9]))  # eager, whatever the shape


def test_blocks_stay_compiled_at_every_size_of_the_ramps(monkeypatch):
    """Compiled one by one they have a form for each window, size and kind of pass: more than torch's limit of 8."""
    compile_any = torch.compile
    monkeypatch.setattr(torch, "compile", lambda what, **_: compile_any(what, backend="eager", dynamic=False))
    torch._dynamo.reset()
    options = MODERN | {"window_pattern": "SSSL", "window_divisor": 4, "window_multiple": 16}
    net = GPT(GPTConfig(8, 2, 2, 16, 32, 128, 64, arch="modern", **options)).init_weights(1)
    ids = {"ids": torch.randint(0, 64, (2, 128), generator=torch.Generator().manual_seed(0))}
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        compile_training(net, by_block=True)
        for share in (0.25, 0.5, 1.0):
            rows = shorter_rows(ids, share)["ids"]
            with short_windows(net, share):
                net(rows, rows).backward()
            with torch.no_grad():
                net(ids["ids"], ids["ids"])
    torch._dynamo.reset()


OWN_GRADIENT = """
import json, sys
import torch
from torch._dynamo.utils import counters
from llm.model.compile import begin_sooner

class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin() * FORWARD
    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos() * BACKWARD

begin_sooner().join()
x = torch.zeros(8, requires_grad=True)
value = torch.compile(lambda x: Scaled.apply(x + 1).sum())(x)
value.backward()
told = {"value": value.item(), "grad": x.grad[0].item(), "hits": counters["aot_autograd"]["autograd_cache_hit"]}
print(json.dumps(told))
"""


@pytest.mark.slow
def test_a_graph_is_kept_on_disk_until_a_function_with_its_own_gradient_changes(tmp_path):
    for forward, backward, hits in ((1, 1, 0), (1, 1, 1), (1, 3, 0), (2, 3, 0), (2, 3, 1)):
        code = OWN_GRADIENT.replace("FORWARD", str(forward)).replace("BACKWARD", str(backward))
        done = run(sys.executable, "-c", code, env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
        want = {"value": 8 * forward * math.sin(1), "grad": backward * math.cos(1), "hits": hits}
        assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(want, rel=1e-5), done.stderr


def test_the_compiler_is_prepared_on_a_cpu_and_waited_for(monkeypatch):
    """A thread that fails costs nothing: the compiler asks again."""
    asked, may_end = [], threading.Event()

    def pick() -> None:
        may_end.wait(10)
        asked.append("instructions")
        raise OSError("no compiler")

    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", pick)
    monkeypatch.setattr(torch, "compile", lambda function, **more: lambda *args: asked.append("step") or args[0])
    net = network()
    compile_training(net)
    threading.Timer(0.1, may_end.set).start()
    net.training_forward_blocks(torch.zeros(1))
    assert asked == ["instructions", "step"]
    compile_training(network(), device=GPU)  # which the network is moved to later
    assert asked == ["instructions", "step"]


@pytest.mark.slow
def test_a_failing_compiler_names_the_part(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nonexistent/g++",))
    net, ids = network(), torch.zeros(2, 16, dtype=torch.long)
    compile_training(net)
    with pytest.raises(UserError, match="compile: the network could not be compiled .*; set compile=false"):
        net(ids, ids, reduction="sum")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "keys"),
    [
        ("train_step", ["--depth", "2", "--seq-len", "64", "--vocab", "300", "--steps", "2", "--compile", "false"],
         ["data_ms", "forward_backward_ms", "optimizer_ms", "framework_ms", "share_of_matmul_rate", "step_peak_mb"]),
        ("optimizer", ["--depth", "2", "--vocab", "300", "--repeats", "1"], ["2026_ms", "torch_ms", "muon_floor_ms"]),
        ("attention", ["--rows", "1", "--heads", "1", "--head-dim", "16", "--window", "256", "--repeats", "1"],
         ["1024_full_ms", "2048_masked_peak_mb", "4096_banded_to_full"]),
        ("loss_head", ["--tokens", "64", "--width", "16", "--vocab", "100", "--repeats", "1"],
         ["chunked_ms", "sampled_ms"]),
        ("tables", ["--vocab", "100", "--width", "16", "--rows", "2", "--tokens", "64", "--repeats", "1"],
         ["embeddings_kept_ms", "ngrams_update_ms"]),
        ("start", ["--depth", "1", "--seq-len", "32", "--vocab", "300", "--repeats", "1", "--compile", "false"],
         ["eager_ours_wall_s", "eager_plain_cpu_s"]),
    ],
)  # fmt: skip
def test_benchmarks_end_with_a_line_of_json(script, options, keys):
    """Measured times are more than nothing: a clock that is read twice at once, or a part that did not run, is 0."""
    done = run(sys.executable, str(REPO / f"bench/{script}.py"), *options)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert set(keys) <= set(values)
    for key in keys:
        least = -math.inf if key == "framework_ms" else 0  # what is left of a step after its parts, give or take
        assert least < values[key] < math.inf, key
