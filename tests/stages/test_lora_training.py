"""Training of an adapter: exact resume from checkpoints without the base, another base refused, what model/ holds."""

import json
import shutil

import pytest
import torch
from conftest import compose
from safetensors import safe_open
from small_training import OPTIM, STAGE, STEPS, fit, net
from test_identity import begin, job_of, put_other_weights, runs, runs_once  # noqa: F401  fixtures

from llm.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_FILE, load_adapter
from llm.checkpoint.model_folder import load_model_folder, save_model_folder
from llm.checkpoint.names import rows_kept
from llm.checkpoint.resume import load_checkpoint
from llm.errors import UserError
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.model.lora import LoRA, adapter_weights, add_adapter, base_weights, merged
from llm.run.content import fingerprints
from llm.stages.common import load_parent, load_tokenizer, with_scalar_head
from llm.stages.parents import check_same_origin
from llm.stages.step_module import StageContext, StepModule
from llm.stages.trainer import needed
from llm.tokenizer.bpe import Tokenizer

RANK = "model.lora.rank=2"


def module(seed=0) -> StepModule:
    adapted = add_adapter(net(), LoRA(2, lr=0.01), seed)
    return StepModule(adapted, OPTIM, STAGE, StageContext("sft", None, torch.ones(70), STEPS, 8))


def test_an_adapter_resumes_exactly_without_its_base_in_the_checkpoint(tmp_path):
    whole, _ = fit(tmp_path / "whole", module=module())
    saved = load_checkpoint(tmp_path / "whole" / "checkpoints" / "step_000004.ckpt")
    assert {f"net.{name}" for name in adapter_weights(whole.net)} == set(saved["state_dict"])
    assert needed(module()).misfit(saved) is None
    rest, _ = fit(
        tmp_path / "rest", ckpt=tmp_path / "whole" / "checkpoints" / "step_000004.ckpt", module=module(seed=9)
    )
    for name, weight in whole.net.state_dict().items():
        assert torch.equal(rest.net.state_dict()[name], weight), name
    for name, weight in net().state_dict().items():
        assert torch.equal(base_weights(whole.net)[name], weight), name


def test_a_checkpoint_of_an_adapter_holds_the_head_that_is_trained_beside_it():
    adapted = add_adapter(with_scalar_head(net(), True), LoRA(2))
    own = StepModule(adapted, OPTIM, STAGE, StageContext("reward", None, torch.ones(70), STEPS, 8))
    kept = own.kept(own.state_dict())
    assert set(kept) == {f"net.{name}" for name, p in adapted.named_parameters() if p.requires_grad}
    assert "net.scalar_head.weight" in kept


def test_an_adapter_of_another_rank_does_not_go_on(tmp_path):
    fit(tmp_path, module=module(), total=2)
    saved = load_checkpoint(tmp_path / "checkpoints" / "step_000002.ckpt")
    other = add_adapter(net(), LoRA(3))
    misfit = needed(StepModule(other, OPTIM, STAGE, StageContext("sft", None, torch.ones(70), STEPS, 8))).misfit(saved)
    assert "lora_A is (2, 16)" in misfit


@pytest.mark.parametrize("listed", [True, False])
def test_an_adapter_is_not_resumed_on_another_base(runs, listed):  # noqa: F811
    """The base has a fingerprint also where an older release left none beside it."""
    if not listed:
        (runs / "tiny/pretrain/model/manifest.json").unlink()
    shutil.rmtree(runs / "tiny" / "midtrain")
    begin(runs, "midtrain", RANK, "init_from=tiny/pretrain")
    check_same_origin(job_of(runs, "midtrain", RANK, "init_from=tiny/pretrain"))
    weights = runs / "tiny/pretrain/model/model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    (runs / "tiny/pretrain/model/manifest.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="begun from another version of"):
        check_same_origin(job_of(runs, "midtrain", RANK, "init_from=tiny/pretrain"))


def test_a_parent_gets_the_adapter_that_is_configured(runs, capsys):  # noqa: F811
    parent = runs / "tiny/pretrain/model"
    cfg = job_of(runs, "midtrain", RANK, "model.lora.targets=[mlp,head]", "model.lora.lr=0.5").cfg
    found, _ = load_parent(parent, cfg)
    assert found.lora == LoRA(2, 32.0, ("mlp", "head"), 0.5, fingerprints(parent)["weights"])
    assert {name.split(".")[-2] for name in adapter_weights(found)} == {"c_fc", "c_proj", "lm_head"}
    assert "adapter of rank 2 on mlp, head" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["model.lora.alpha=8"], "model.lora.alpha: there is no adapter without a rank"),
        ([RANK, "model.lora.targets=[]"], r"model.lora.targets=\[\]: an adapter needs a matrix"),
        ([RANK, "precision.fp8=true"], "model.lora.rank: not tested with fp8"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(runs, lines, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        load_parent(runs / "tiny/pretrain/model", job_of(runs, "midtrain", *lines).cfg)


def test_a_fresh_network_takes_no_adapter(runs):  # noqa: F811
    cfg = compose("train", "experiment=tiny", "stage=pretrain", RANK)
    with pytest.raises(UserError, match="model.lora.rank=2: a fresh network has no weights to keep"):
        load_tokenizer(runs / "tiny/tokenizer/model", cfg)


def test_model_folder_holds_merged_weights_and_the_adapter(tokenizer_runs, tmp_path):
    """The merged weights are those of base plus adapter, and the adapter is read back bit for bit."""
    tokenizer = Tokenizer.load(tokenizer_runs / "tiny/tokenizer/model")
    shape = GPTConfig(1, 1, 1, 16, 16, 8, tokenizer.vocab_size)
    base, adapted = GPT(shape).init_weights(0), GPT(shape).init_weights(0)
    add_adapter(adapted, LoRA(2, targets=("mlp", "head")))
    with torch.no_grad():
        for name, weight in adapter_weights(adapted).items():
            weight[: rows_kept(name, weight, shape)].normal_(generator=torch.Generator().manual_seed(3))
    folder = tmp_path / "model"
    save_model_folder(folder, adapted, tokenizer)
    found, _ = load_model_folder(folder)
    rows = tokenizer.vocab_size
    for name, weight in merged(adapted).state_dict().items():
        cut = slice(rows if name.startswith(("lm_head", "transformer.wte")) else None)
        assert torch.equal(found.state_dict()[name][cut], weight[cut]), name
    again, wanted = load_adapter(folder, base), adapter_weights(adapted)
    assert again.lora == adapted.lora and set(again.weights) == set(wanted)
    for name, weight in wanted.items():
        assert torch.equal(again.weights[name], weight), name
    listed = json.loads((folder / "manifest.json").read_text())
    assert {ADAPTER_FILE, ADAPTER_CONFIG} <= set(listed)
    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        names = set(file.keys())
    assert "base_model.model.model.layers.0.mlp.fc1.lora_A.weight" in names
    assert "base_model.model.lm_head.lora_B.weight" in names


def test_document_masks_begin_with_any_stage(runs, capsys):  # noqa: F811
    """They add no weights, so the parent's fit."""
    parent = runs / "tiny/pretrain/model"
    base, _ = load_parent(parent, job_of(runs, "midtrain").cfg)
    masked, _ = load_parent(parent, job_of(runs, "midtrain", "arch.document_masks=true").cfg)
    assert base.config.bos_id is None and masked.config.bos_id is not None
    assert "document masks switched" in capsys.readouterr().out
    with torch.no_grad():  # attention writes nothing at first
        for found in (base, masked):
            found.transformer.h[0].attn.c_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    bos = masked.config.bos_id
    row, begun = torch.tensor([[bos, 1, 2, bos, 3, 4]]), torch.tensor([[bos, 3, 4]])
    torch.testing.assert_close(masked(row)[:, 3:], masked(begun), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(base(row)[:, 3:], base(begun), atol=1e-1)
