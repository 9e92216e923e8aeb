"""The Triton kernels of Muon's passes: run by Triton's interpreter on a CPU, and compiled for a GPU that is not here.

`make triton` installs Triton, 1 GB, into a folder of its own and runs these. Two tests need none.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import REPO, compose
from test_muon_cpu import (
    SHAPES,
    check_cautious_decay,
    check_look_ahead,
    check_mean_squares_and_scaling,
    drawn,
    group,
    steps_of,
)

from llm.errors import UserError
from llm.optim import muon_adamw, muon_cpu, muon_gpu
from llm.stages.device import DeviceOptions
from llm.stages.plan import check_switches

interpreted = pytest.mark.skipif(
    muon_gpu.load() is None or os.environ.get("TRITON_INTERPRET") != "1", reason="make triton runs it"
)
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llm.optim import muon_gpu_kernels as kernels
POINTERS = dict.fromkeys(("grads", "buffers", "params"), "*i64") | dict.fromkeys(("means", "factors", "step"), "*fp32")
TYPES = POINTERS | {"update": "*bf16"} | dict.fromkeys(("rows", "cols"), "i32")
TYPES |= dict.fromkeys(("momentum", "length", "decay"), "fp32")
GIVEN = {"ALIGNMENT": 16, "BLOCK": 2048, "BY_ROWS": False, "ROWS": 32, "COLUMNS": 64}
for name in ("look_ahead", "mean_squares_of_rows", "mean_squares_of_columns", "scaled", "apply"):
    kernel = getattr(kernels, name)
    types = {arg: TYPES.get(arg, "constexpr") for arg in kernel.arg_names}
    places = {arg: (place,) for place, arg in enumerate(types)}
    given = {places[arg]: GIVEN[arg] for arg in types if arg in GIVEN}
    even = {places[arg]: [["tt.divisibility", 16]] for arg, kind in types.items() if kind[0] in "*i"}
    source = ASTSource(kernel, types, constexprs=given, attrs=even)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    assert "ld.global.v4" in code and ".local" not in code, name
    assert "cvt.rn.bf16" in code or name != "look_ahead"  # rounded to the nearest
    print(name)
"""


@pytest.fixture
def on_cpu(monkeypatch):
    """Let Muon take the Triton kernels for tensors of the CPU."""
    monkeypatch.setattr(muon_gpu, "DEVICES", ("cpu",))
    monkeypatch.setattr(muon_cpu, "computes", lambda *_: False)
    muon_gpu.turn_on(True)
    yield
    muon_gpu.turn_on(False)


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_and_rows_are_those_of_float64(shape, dtype):
    check_look_ahead(muon_gpu, shape, dtype, 8e-3 if dtype == torch.bfloat16 else 1e-5)  # the interpreter cuts bits off


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_rows", [True, False])
def test_mean_squares_and_scaling_are_those_of_float64(shape, dtype, of_rows):
    check_mean_squares_and_scaling(muon_gpu, shape, dtype, of_rows)


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cautious_decay_is_that_of_float64(shape):
    check_cautious_decay(muon_gpu, shape)


@interpreted
@pytest.mark.parametrize("shape", [(5, 37), (37, 5), (64, 64)])
@pytest.mark.parametrize("changed", [{}, {"cautious": False}, {"renormalize": False}, {"normuon_rows": True}])
def test_a_step_is_that_of_torch(shape, changed, on_cpu):
    assert muon_adamw.kernels_for(drawn(*shape)) is muon_gpu
    ours = steps_of(group(**changed), *shape)
    muon_gpu.turn_on(False)
    assert muon_adamw.kernels_for(drawn(*shape)) is None
    for found, want in zip(ours, steps_of(group(**changed), *shape), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@interpreted
def test_heads_that_begin_anywhere_are_updated_alike(on_cpu):
    """A head of 3 rows of 5 numbers begins at no multiple of 16 bytes."""
    of_heads = group(head_rows=3)
    ours = steps_of(of_heads, 12, 5)
    muon_gpu.turn_on(False)
    for found, want in zip(ours, steps_of(of_heads, 12, 5), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(muon_gpu.load() is None, reason="make triton runs it")
def test_kernels_compile_for_a_gpu_read_four_numbers_at_once_and_keep_them_in_registers(tmp_path):
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [
        *("look_ahead", "mean_squares_of_rows", "mean_squares_of_columns", "scaled", "apply")
    ], done.stderr


def test_they_are_off_until_a_stage_turns_them_on_and_a_cpu_keeps_its_own():
    def prepared(device: str, **switches) -> str:
        options = DeviceOptions("fp32", False, "auto", False, False, True, True, **switches)
        net = torch.nn.Module()
        net.set_attention = lambda *_: "none"
        return options.prepare(net, torch.device(device), False, "pretrain", 1)

    weights = [torch.randn(8, 8)]
    try:
        assert "Muon" not in prepared("cpu") and not muon_gpu._is_on
        assert "they are for GPUs, and this is cpu" in prepared("cpu", muon_kernels=True)
        assert muon_gpu._is_on and not muon_gpu.computes(weights)
        assert muon_adamw.kernels_for(weights) in (muon_cpu, None)
        prepared("cpu")
        assert not muon_gpu._is_on
    finally:
        muon_gpu.turn_on(False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim=adamw"], "none of optim.row_normalize, normuon_beta2, renormalize, cautious is on"),
        (["optim=muon_2025"], "none of optim.row_normalize"),
        (["model.lora.rank=4"], "an adapter learns by AdamW"),
        (["optim.dion_rank=0.25"], "optim.dion_rank=0.25 takes the place of Muon"),
    ],
)
def test_a_switch_without_effect_is_refused(settings, message):
    check_switches(compose("train", *settings))
    with pytest.raises(UserError, match=f"gpu.muon_kernels=true: {message}"):
        check_switches(compose("train", *settings, "gpu.muon_kernels=true"))
    check_switches(compose("train", "gpu.muon_kernels=true", "optim=muon_2026_02"))
