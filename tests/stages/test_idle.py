"""Settings that nothing would read beside others: refused where the command names them, and taken where it does not."""

import pytest
from conftest import compose

from llm.errors import UserError
from llm.stages.idle import check_idle


@pytest.mark.parametrize(
    "idle, read, why",
    [
        ("stage=dpo stage.gamma=2", "stage.loss=simpo", "a stage.loss other than simpo"),
        ("stage=dpo stage.odds_weight=2", "stage.loss=orpo", "a stage.loss other than orpo"),
        ("stage=dpo stage.undesirable_weight=2", "stage.loss=kto", "a stage.loss other than kto"),
        ("stage=dpo stage.loss=ipo stage.label_smoothing=0.1", "stage.loss=dpo", "other than dpo and simpo"),
        ("arch.ngram_rows=8", "arch.ngrams=[2]", "arch.ngrams=[]"),
        ("data=local data.size=5", "data=embedded", "text that is not generated"),
        ("data=fineweb_edu data.seed=5", "data=embedded", "text that is not generated"),
        ("optim.copy_lr=0.1", "arch.copy_candidate=true", "arch.copy_candidate=false"),
        ("arch.value_embeds=false arch.gate_range=2", "arch.value_embeds=true", "arch.value_embeds=false"),
        ("optim.momentum_final=null optim.momentum_overlap=true", "optim.momentum_final=0.8", "momentum_final=null"),
        ("optim.hyperball=true optim.weight_decay=0.1", "optim.hyperball=false", "optim.hyperball=true"),
        ("optim.hyperball=true optim.coupled_decay=false", "optim.hyperball=false", "optim.hyperball=true"),
        ("optim.dion_rank=0.5 optim.ns_steps=4", "optim.dion_rank=null", "optim.dion_rank"),
        ("optim.dion_rank=0.5 optim.normuon_beta2=0.8", "optim.dion_rank=null", "optim.dion_rank"),
        ("arch.value_embeds=false optim.value_lr=0.1", "arch.value_embeds=true", "arch.value_embeds=false"),
        ("arch=classic optim.x0_lr=0.05", "arch=modern", "arch.residual_scalars=false"),
        ("arch.residual_scalars=false optim.x0_lr=0.05", "arch.residual_scalars=true", "residual_scalars=false"),
        ("arch.asymmetric_cap=true arch.softcap=30", "arch.asymmetric_cap=false", "arch.asymmetric_cap=true"),
        ("arch.window_pattern=L arch.window_divisor=2", "arch.window_pattern=SL", "arch.window_pattern=L"),
        ("arch.window_pattern=L arch.window_multiple=64", "stage.window_ramp=0.4", "arch.window_pattern=L"),
        ("stage.warmdown_ratio=0 stage.warmdown_power=2", "stage.warmdown_ratio=0.5", "stage.warmdown_ratio=0"),
        ("arch.value_embeds=false optim.value_decay=0.1", "arch.value_embeds=true", "arch.value_embeds=false"),
        ("arch.value_embeds=false optim.value_betas=[0.7,0.9]", "arch.value_embeds=true", "arch.value_embeds=false"),
        ("arch.value_embeds=false arch.gate_channels=16", "arch.attention_gate=true", "arch.attention_gate=false"),
        ("arch.value_embeds=false arch.smear=false arch.gate_init=0.1", "arch.smear=true", "arch.smear=false"),
        ("arch.residual_scalars=false arch.resid_init=[1,2]", "arch.residual_scalars=true", "residual_scalars=false"),
        ("arch.residual_scalars=false optim.x0_betas=[0.7,0.9]", "arch.residual_scalars=true", "residual_scalars"),
        ("arch.smear=false arch.backout=false optim.smear_lr=0.1", "arch.backout=true", "arch.smear"),
        ("stage=sft model.lora.rank=8 optim.matrix_lr=0.1", "model.lora.rank=null", "whose rate is model.lora.lr"),
        ("stage=distill stage.source=data stage.curriculum=pass_rate", "stage.source=rollouts", "stage.source=data"),
    ],
)
def test_a_key_that_nothing_reads_is_refused_where_the_command_names_it(idle, read, why):
    *others, named = idle.split()
    with pytest.raises(UserError, match=r"nothing reads it with .*leave it out") as refused:
        check_idle(compose("train", *others, named))
    assert str(refused.value).startswith(named.partition("[")[0]) and why in str(refused.value)
    check_idle(compose("train", *others))
    key = read.split("=")[0]
    check_idle(compose("train", *(one for one in others if not one.startswith(f"{key}=")), named, read))


def test_experiments_set_what_they_like():
    for experiment in ("small", "own", "speedrun", "speedrun_2025", "speedrun_2026_08", "demo", "tiny"):
        for stage in ("pretrain", "dpo"):
            check_idle(compose("train", f"experiment={experiment}", f"stage={stage}"))


def test_other_stages_may_have_keys_of_these_names():
    check_idle(compose("train", "stage=ppo", "stage.gamma=0.99"))
