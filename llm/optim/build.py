"""Build the optimizer that a configuration names, with a parameter group per kind."""

import torch
from torch import nn

from llm.optim.muon_adamw import MuonAdamW
from llm.scaling.rules import adam_lr_scale


def build_optimizer(
    net: nn.Module, optim, lr_scale: float = 1.0, decay_scale: float = 1.0, optimizer: type[MuonAdamW] = MuonAdamW
) -> MuonAdamW:
    """Optimizer for a GPT by the config group `optim`; the scales multiply all learning rates and Muon's decay.

    muon_adamw: matrices of the blocks by Muon; head, embeddings, scalars and gpt2's vectors by AdamW, each kind with
    its own rate, betas and decay; rates of tables and head follow the width rule of `llm.scaling.rules`.
    adamw: one learning rate for all, weight decay on the matrices of the blocks only.
    """
    kinds = _params_by_kind(net)
    decay = optim.weight_decay * decay_scale
    if optim.name == "adamw":
        adam = {"kind": "adamw", "betas": tuple(optim.betas), "eps": optim.eps, "lr": optim.lr * lr_scale}
        rest = [p for name, params in kinds.items() if name != "matrices" for p in params]
        return optimizer(
            [
                adam | {"params": kinds["matrices"], "weight_decay": decay, "decays": True},
                adam | {"params": rest, "weight_decay": 0.0},
            ]
        )
    width = adam_lr_scale(net.config.n_embd)
    rules = {  # kind: rate, betas, decay
        "head": (optim.unembedding_lr * width, optim.unembedding_betas, optim.unembedding_decay),
        "embedding": (optim.embedding_lr * width, optim.embedding_betas, optim.embedding_decay),
        "value_embeds": (optim.value_lr * width, optim.value_betas, optim.value_decay),
        "residual": (optim.resid_lr, optim.betas, optim.resid_decay),
        "x0": (optim.x0_lr, optim.x0_betas, 0.0),
        "smear": (optim.smear_lr, optim.betas, 0.0),
        "vectors": (optim.resid_lr, optim.betas, 0.0),
    }
    groups = []
    for kind, (lr, betas, own_decay) in rules.items():
        if kinds[kind]:
            group = {"kind": "adamw", "params": kinds[kind], "lr": lr * lr_scale, "betas": tuple(betas)}
            groups.append(group | {"eps": optim.eps, "weight_decay": own_decay})
    muon = {name: optim[name] for name in MuonAdamW.MUON_DEFAULTS if name in optim}
    muon["in_bf16"] = net.compute_dtype == torch.bfloat16
    muon |= {"kind": "muon", "params": kinds["matrices"], "lr": optim.matrix_lr * lr_scale}
    return optimizer([*groups, muon | {"weight_decay": decay, "decays": True}])


def _params_by_kind(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter once, under the name of the rule that trains it."""
    kinds: dict[str, list[nn.Parameter]] = {
        kind: [] for kind in ("head", "embedding", "value_embeds", "residual", "x0", "smear", "vectors", "matrices")
    }
    places = {
        "lm_head.": "head",
        "transformer.wte.": "embedding",
        "transformer.wpe.": "embedding",
        "value_embeds.": "value_embeds",
        "resid_scalars": "residual",
        "x0_scalars": "x0",
        "smear_": "smear",
        "backout_": "smear",
    }
    for name, p in net.named_parameters():
        place = next((kind for start, kind in places.items() if name.startswith(start)), None)
        kinds[place or ("matrices" if p.ndim == 2 else "vectors")].append(p)
    return kinds
