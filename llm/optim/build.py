"""Build the optimizer that a configuration names, with a parameter group per kind of parameter."""

from itertools import count

import torch
from torch import nn

from llm.config.registries import OPTIMIZERS
from llm.errors import UserError
from llm.optim.muon_adamw import MUON_NEEDS
from llm.optim.muon_switches import DETAILS, SWITCHES
from llm.optim.optimizer import GroupOptimizer
from llm.scaling.rules import adam_lr_scale

ROWS_ONLY = (
    "optim.hyperball=true: no process has a whole matrix with strategy=fsdp; use strategy=muon or ddp, or set "
    "optim.hyperball=false"
)
LORA_BETAS, LORA_EPS = (0.9, 0.999), 1e-8  # AdamW's own
KINDS = ("head", "embedding", "value_embeds", "ngrams", "residual", "x0", "copies", "smear", "vectors", "matrices")


def build_optimizer(
    net: nn.Module,
    optim,
    lr_scale: float = 1.0,
    decay_scale: float = 1.0,
    optimizer: type = GroupOptimizer,
    fixed_lr_scale: float | None = None,
) -> GroupOptimizer:
    """Build the optimizer of a GPT that the config group `optim` names, as an `optimizer` (GroupOptimizer or a kind).

    lr_scale multiplies the learning rates of all groups, but of those with `fixed_lr` where fixed_lr_scale is given:
    that multiplies theirs, and the mark stays. decay_scale multiplies the weight decay of groups with `decays`. A
    network with an adapter has a group of its own. Raises UserError for a name that does not exist, and where a trained
    parameter is not in exactly one group.
    """
    if getattr(net, "lora", None) is not None:
        groups = lora_groups(net)
    else:
        groups = OPTIMIZERS.get(optim.name, "optim.name")(net, optim)
        for group in groups:
            is_fixed = group.pop("fixed_lr", False) and fixed_lr_scale is not None
            group["lr"] = group["lr"] * (fixed_lr_scale if is_fixed else lr_scale)
            if is_fixed:
                group["fixed_lr"] = True
            if group.get("decays"):
                group["weight_decay"] = group["weight_decay"] * decay_scale
    if optimizer.holds_rows and any(group.get("hyperball") for group in groups):
        raise UserError(ROWS_ONLY)
    check_groups(net, groups)
    name_groups(net, groups)
    return optimizer(groups)


def name_groups(net: nn.Module, groups: list[dict]) -> None:
    """Give every group without a name one that says what it holds: head, embedding, matrices ..., by `params_by_kind`.

    A group of several kinds is `others`, that of an adapter `adapter`; a name that is taken gets a number. By these
    names learning rates are shown.
    """
    kinds = {id(p): kind for kind, params in params_by_kind(net).items() for p in params}
    taken: set[str] = set()
    for group in groups:
        held = {kinds.get(id(p)) for p in group["params"]}
        holds = held.pop() if len(held) == 1 else None
        name = group.get("name") or ("adapter" if getattr(net, "lora", None) is not None else holds or "others")
        numbers = (f"{name}_{number}" for number in count(2))
        group["name"] = name if name not in taken else next(other for other in numbers if other not in taken)
        taken.add(group["name"])


def lora_groups(net: nn.Module) -> list[dict]:
    """Return the group of an adapter, whatever optimizer is configured: AdamW without decay, at the adapter's own rate.

    AdamW is what the field trains adapters with. Muon would give all directions of an update one length, also those
    that hold noise alone, and of the thin matrices all are in use. The rate is taken as it is: rates of another
    optimizer, and shares of them, say nothing about it.
    """
    params = [p for p in net.parameters() if p.requires_grad]
    return [
        {"kind": "adamw", "params": params, "lr": net.lora.lr, "betas": LORA_BETAS, "eps": LORA_EPS, "fixed_lr": True}
    ]


def muon_adamw_groups(net: nn.Module, optim) -> list[dict]:
    """Return the groups of optim=muon_adamw: Muon, or Dion, for the matrices of the blocks, AdamW for everything else.

    Head, embeddings, scalars and gpt2's vectors each have a rate, betas and decay of their own; the rates of tables and
    head follow the width rule of `llm.scaling.rules`. In pretraining smear and backout have one rate for all batches.
    """
    kinds, width = params_by_kind(net), adam_lr_scale(net.config.n_embd)
    head = (optim.unembedding_lr * width, optim.unembedding_betas, optim.unembedding_decay)
    own = (optim.embedding_lr * width, optim.embedding_betas, optim.embedding_decay)
    rules = {  # kind: rate, betas, decay
        "head": head,
        "embedding": head if getattr(net, "tied_learns_as_head", False) and net.lm_head is None else own,
        "value_embeds": (optim.value_lr * width, optim.value_betas, optim.value_decay),
        "residual": (optim.resid_lr, optim.betas, optim.resid_decay),
        "x0": (optim.x0_lr, optim.x0_betas, 0.0),
        "copies": (optim.get("copy_lr"), optim.betas, 0.0),  # older configurations lack it
        "smear": (optim.smear_lr, optim.betas, 0.0),
        "vectors": (optim.resid_lr, optim.betas, 0.0),
    }
    of_tables = [optim.get(f"ngram_{name}") for name in ("lr", "betas", "decay")]  # older configurations lack these
    if kinds["ngrams"]:
        rules["ngrams"] = (of_tables[0] * width, *of_tables[1:])
    groups = []
    for kind, (lr, betas, own_decay) in rules.items():
        if kinds[kind]:
            group = {
                "kind": "row_adamw" if kind == "ngrams" else "adamw",
                "params": kinds[kind],
                "lr": lr,
                "betas": tuple(betas),
            }
            groups.append(group | {"eps": optim.eps, "weight_decay": own_decay, "fixed_lr": kind == "smear"})
    muon = {name: optim[name] for name in MUON_NEEDS if name != "in_bf16"}
    switches = {name: optim[name] for name in SWITCHES if name in optim}
    check_switches(optim, muon | switches)
    muon |= switches
    muon |= {"kind": "muon", "params": kinds["matrices"], "lr": optim.matrix_lr}
    muon |= {"in_bf16": net.compute_dtype == torch.bfloat16}
    muon |= {"weight_decay": optim.weight_decay, "decays": True}
    if optim.get("dion_rank") is not None:
        return [*groups, muon | {"kind": "dion", "dion_rank": optim.dion_rank}]
    return [*groups, *(by_heads(net, muon) if optim.get("per_head") else [muon])]


def by_heads(net: nn.Module, group: dict) -> list[dict]:
    """Divide a group of matrices: those whose rows are of attention heads, by the rows of a head, and the others."""
    heads = {"attn.c_q.weight": net.config.n_head, "attn.c_k.weight": net.config.n_kv_head}
    heads["attn.c_v.weight"] = net.config.n_kv_head
    parts: dict[int | None, list] = {}
    names = {id(p): name for name, p in net.named_parameters()}
    for p in group["params"]:
        count = next((count for end, count in heads.items() if names[id(p)].endswith(end)), None)
        parts.setdefault(None if count is None else p.size(0) // count, []).append(p)
    return [group | {"params": params, "head_rows": rows} for rows, params in parts.items()]


def adamw_groups(net: nn.Module, optim) -> list[dict]:
    """Return the groups of optim=adamw: one learning rate for all, weight decay on the matrices of the blocks only.

    With `hyperball` these keep their norms instead (AdamH).
    """
    kinds = params_by_kind(net)
    adam = {"kind": "adamw", "betas": tuple(optim.betas), "eps": optim.eps, "lr": optim.lr}
    rest = [p for name, params in kinds.items() if name not in ("matrices", "ngrams") for p in params]
    tables = [adam | {"kind": "row_adamw", "params": kinds["ngrams"], "weight_decay": 0.0}] if kinds["ngrams"] else []
    ball = {"kind": "adamh", "hyperball": True} if optim.get("hyperball") else {}
    return [
        adam | {"params": kinds["matrices"], "weight_decay": optim.weight_decay, "decays": True} | ball,
        adam | {"params": rest, "weight_decay": 0.0},
        *tables,
    ]


def params_by_kind(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort the parameters of a network by kind, each under one name; a kind may be empty.

    matrices: 2-D weights of the blocks; vectors: other parameters of the blocks and norms; head, embedding (tokens and
    positions), value_embeds: tables; ngrams: tables of which a step uses few rows; residual, x0, copies, smear: scalars
    and gates of arch=modern, `residual` those of n-grams too, `smear` those of smear, backout and exclusive attention.
    """
    kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    places = {
        "lm_head.": "head",
        "scalar_head.": "head",
        "transformer.wte.": "embedding",
        "transformer.wpe.": "embedding",
        "value_embeds.": "value_embeds",
        "ngrams.tables.": "ngrams",
        "ngrams.scalars": "residual",
        "copies.": "copies",
        "resid_scalars": "residual",
        "x0_scalars": "x0",
        "smear_": "smear",
        "backout_": "smear",
    }
    for name, p in net.named_parameters():
        place = next((kind for start, kind in places.items() if name.startswith(start)), None)
        place = "smear" if name.endswith(".exclusion") else place
        kinds[place or ("matrices" if p.ndim == 2 else "vectors")].append(p)
    return kinds


def check_switches(optim, group: dict) -> None:
    """Raise UserError for a detail of a switch of Muon that is off, and for a switch of Muon beside Dion."""
    if optim.get("dion_rank") is not None:
        for name in (*SWITCHES, "per_head"):
            if optim.get(name) not in (None, False):
                raise UserError(
                    f"optim.{name}={str(optim[name]).lower()}: a switch of Muon, whose place optim.dion_rank="
                    f"{optim.dion_rank} takes; leave one of the two out"
                )
    for name, switch, usual in DETAILS:
        value = group.get(name)
        if value not in (None, False) and group.get(switch) is None:
            raise UserError(
                f"optim.{name}={str(value).lower()}: it belongs to optim.{switch}, which is off; set "
                f"optim.{switch}={usual}, or leave it out"
            )


def check_groups(net: nn.Module, groups: list[dict]) -> None:
    """Raise UserError where a trained parameter of the network is in no group, or in more than one."""
    counts: dict[int, int] = {}
    for p in (p for group in groups for p in group["params"]):
        counts[id(p)] = counts.get(id(p), 0) + 1
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    wrong = [f"{name} is in {counts.get(id(p), 0)}" for name, p in trained if counts.get(id(p)) != 1]
    if wrong:
        raise UserError(f"every parameter must be in one group of the optimizer: {', '.join(wrong[:5])}")
