"""Tests of what a stage takes from its parent, and of how a finished stage goes on."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import compose
from omegaconf import OmegaConf
from safetensors.torch import load_file

from llm.config.stages import stage_row
from llm.errors import UserError
from llm.experiments.runs import stage_row_of
from llm.optim.optimizer import GroupOptimizer
from llm.run.formats import read_scores
from llm.run.stage_folder import ITEM_FOLDERS, OTHER_DATA, SCORE_FILES, RunDir, read_metrics
from llm.scaling.rules import model_config
from llm.stages import finetune, pretrain
from llm.stages.job import Job
from llm.stages.parents import differing
from llm.stages.run_stage import run_stage
from llm.stages.shape import set_arch
from llm.stages.warm_start import parent_optimizer, take_state
from llm.utils.files import write_json

EVEN = ("stage.warmdown_ratio=0", "stage.warmup_steps=0", "optim=adamw", "stage.sample_every=0")


def train(root, *args) -> None:
    run_stage(compose("train", "experiment=tiny", f"paths.runs={root}", "trainer=cpu", *args))


def refusal(root, *args) -> str:
    with pytest.raises(UserError) as caught:
        train(root, *args)
    return str(caught.value)


def record(root, run, stage="pretrain") -> dict:
    return json.loads((root / run / stage / "run.json").read_text())


def weights(root, run, stage="pretrain") -> dict:
    return load_file(root / run / stage / "model" / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Run `a`: a tokenizer and four steps of pretraining, of another shape than experiment=tiny has."""
    folder = tmp_path_factory.mktemp("init") / "runs"
    train(folder, "run=a", "stage=tokenizer")
    train(folder, "run=a", "stage=pretrain", "model.seq_len=64", "arch=classic", "max_steps=4", *EVEN)
    return folder


CONTINUE = ("stage=pretrain", "init_from=a/pretrain", "max_steps=1", "stage.sample_every=0")


def test_pretrain_continues_the_weights_of_a_model_stage(root, capsys):
    """The first loss is the parent's last, not that of a fresh network; the shape is the parent's."""
    train(root, "run=on", *CONTINUE)
    said = capsys.readouterr().out
    assert "a/pretrain/model: weights and tokenizer (384 tokens)" in said
    assert "model    classic, 2 layers, 128 wide, context 64: " in said
    first, last = read_metrics(root / "on" / "pretrain")[0], read_metrics(root / "a" / "pretrain")[-1]
    assert first["step"] == 0 and first["bpb"] == last["bpb"]
    saved = record(root, "on")["config"]
    assert saved["model"]["seq_len"] == 64 and saved["arch"]["name"] == "classic" and saved["model"]["depth"] == 2


def test_pretrain_from_a_tokenizer_is_fresh(root, capsys):
    train(root, "run=fresh", "stage=pretrain", "init_from=a/tokenizer", "max_steps=1", "stage.sample_every=0")
    assert "the weights are fresh" in capsys.readouterr().out
    assert record(root, "fresh")["config"]["arch"]["name"] == "modern"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["model=d4"], "model.depth: configured 4, found 2"),
        (["model.seq_len=32"], "model.seq_len: configured 32, found 64"),
        (["arch=modern"], "arch: configured modern, found classic"),
        (["arch.softcap=30"], "arch.softcap: configured 30.0, found 15.0"),
        (["arch.smear=false"], "arch: configured modern, found classic"),
    ],
)
def test_what_the_command_says_against_the_parent_is_refused(root, args, says):
    said = refusal(root, "run=no", *CONTINUE, *args)
    assert says in said and "takes the model's shape from its parent" in said
    assert not (root / "no").exists()


def test_a_stage_that_has_begun_says_that_its_parent_is_gone(root):
    """Not that its configuration differs: without the parent's shape it would."""
    shutil.copytree(root / "a", root / "parent")
    args = ("run=begun", "stage=pretrain", "init_from=parent/pretrain", "max_steps=1", "stage.sample_every=0")
    train(root, *args)
    shutil.rmtree(root / "parent")
    train(root, *args)  # a finished stage can do without
    write_json(root / "begun" / "pretrain" / "run.json", record(root, "begun") | {"status": "interrupted"})
    said = refusal(root, *args)
    assert "parent/pretrain" in said and "another configuration" not in said


def test_a_stage_is_not_its_own_parent(root):
    assert "result of this stage itself" in refusal(root, "run=a", *CONTINUE, "overwrite=true")
    assert record(root, "a")["status"] == "finished"


def test_sft_offers_pretrain_where_midtrain_was_not_run(root):
    assert "init_from=a/pretrain" in refusal(root, "run=a", "stage=sft")


def test_no_hint_names_the_tokenizer_of_another_run(root):
    assert "init_from=a/tokenizer" not in refusal(root, "run=new", "stage=pretrain")


def test_the_run_of_a_parent_without_a_name_is_named_by_its_depth(root):
    cfg = compose("train", "stage=sft", "init_from=a/pretrain", f"paths.runs={root}", "max_steps=1", "dry_run=true")
    from llm.config.stages import stage_row
    from llm.run.stage_folder import RunDir
    from llm.stages.shape import take_shape

    assert take_shape(cfg, stage_row("sft"), RunDir(root, "d20")).name == "d2"
    assert (cfg.model.depth, cfg.model.seq_len, cfg.arch.name) == (2, 64, "classic")


@pytest.mark.parametrize("now", ["modern", "modern_2026_02", "classic"])
def test_windows_of_a_parent_from_before_they_could_be_exact_stay(now):
    """Its config.json does not say to what they are rounded: 128, whatever the option of arch says now."""
    parent = compose("train", "model=d4", "arch=modern_2026_02")
    shape = model_config(parent.model, parent.arch, 300).to_dict()
    del shape["window_multiple"]
    cfg = compose("train", "stage=sft", "model=d4")
    cfg.arch = compose("train", f"arch={now}").arch
    set_arch(cfg, shape)
    assert (cfg.arch.window_divisor, cfg.arch.window_multiple) == (2, 128)
    set_arch(cfg, shape | {"window_multiple": None})
    assert cfg.arch.window_multiple is None


def test_warm_start_takes_the_optimizer_state(root):
    """A warm start with a rate of nearly 0 ends with the second moments of the parent, hardly moved."""
    still = ("optim=adamw", "stage.lr_frac=1e-9")
    train(root, "run=warm", *CONTINUE, *still, "stage.warm_start=true")
    train(root, "run=cold", *CONTINUE, *still)

    def steps(run, step):
        file = torch.load(root / run / "pretrain" / "checkpoints" / f"step_{step:06d}.ckpt", weights_only=True)
        return {name: state["step"] for name, state in file["optimizer_states"][0]["state"].items()}

    before, warm, cold = steps("a", 4), steps("warm", 1), steps("cold", 1)
    assert {float(n) for n in warm.values()} == {float(n) + 1 for n in before.values()} == {5.0}
    assert {float(n) for n in cold.values()} == {1.0}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["init_from=a/pretrain", "optim=muon_adamw"], "trained by another optimizer"),
        (["init_from=a/tokenizer", "optim=adamw"], "holds no weights"),
    ],
)
def test_a_warm_start_that_cannot_be_is_refused(root, args, says):
    assert says in refusal(root, "run=no", *CONTINUE, "stage.warm_start=true", *args)


def test_a_warm_start_asks_no_other_process_for_its_state():
    """The optimizer of several processes refuses `state_dict` until its shares were gathered."""

    class Sharded(GroupOptimizer):
        def state_dict(self):
            raise RuntimeError("call consolidate_state_dict first")

    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = Sharded([{"kind": "adamw", "params": [p], "lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-8}])
    state = {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
    strategy = SimpleNamespace(
        load_optimizer_state_dict=lambda saved: optimizer.load_state_dict(saved["optimizer_states"][0])
    )
    take_state(SimpleNamespace(optimizers=[optimizer], strategy=strategy), state)
    assert optimizer.state[p]["step"] == 5 and optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"weights": {"step": 2}}, "handed over the weights of step 2 (stage.keep_best)"),
        ({"config": {"stage": {"average_steps": 3}}}, "an average of weights (stage.average_steps=3)"),
    ],
)
def test_a_warm_start_with_the_optimizer_of_other_weights_is_refused(root, changed, says):
    manifest = record(root, "a")
    try:
        write_json(root / "a" / "pretrain" / "run.json", manifest | changed)
        with pytest.raises(UserError, match=re.escape(says)):
            parent_optimizer(root / "a" / "pretrain" / "model", None, None)
    finally:
        write_json(root / "a" / "pretrain" / "run.json", manifest)


def test_a_warm_start_with_the_optimizer_beside_an_average_of_a_callback_is_refused(root, monkeypatch):
    saved = {"current_model_state": {}, "optimizer_states": [{}]}
    monkeypatch.setattr("llm.stages.warm_start.load_checkpoint", lambda path: saved)
    with pytest.raises(UserError, match=r"an average of weights \(a callback of `callbacks`\), which its optimizer"):
        parent_optimizer(root / "a" / "pretrain" / "model", None, None)


def test_a_warm_start_with_switches_that_the_parent_did_not_have_is_refused(root):
    shape = ("model.seq_len=64", "arch=classic", "max_steps=1", "stage.sample_every=0")
    train(root, "run=m", "stage=pretrain", "init_from=a/tokenizer", *shape)
    warm = ("run=no", "stage=pretrain", "init_from=m/pretrain", "stage.warm_start=true", *shape)
    for key in ("soap_beta=0.9", "muon2_beta=0.9", "slow_momentum=0.98", "normuon_rows=true"):
        said = refusal(root, *warm, f"optim.{key}")
        assert "m/pretrain was trained with other keys of optim (tensor state." in said
        assert "set stage.warm_start=false" in said
    train(root, *warm, "optim.normuon_beta2=null")  # what the parent has besides is left


@pytest.mark.slow
def test_a_lengthened_stage_is_that_of_one_go(root, capsys):
    """With rates that do not depend on the horizon: same data, same weights, bit for bit."""
    run = ("stage=pretrain", "init_from=a/tokenizer", *EVEN)
    train(root, "run=straight", *run, "max_steps=5")
    train(root, "run=longer", *run, "max_steps=3")
    (root / "longer" / "pretrain" / "eval.json").write_text("{}")
    train(root, "run=longer", *run, "max_steps=5")
    assert "lengthened from 3 to 5 steps" in capsys.readouterr().out
    assert same(weights(root, "straight"), weights(root, "longer"))
    assert (root / "longer" / "pretrain" / "scores_of_step_3" / "eval.json").exists()
    assert record(root, "longer")["horizons"] == [3, 5] and record(root, "longer")["status"] == "finished"
    train(root, "run=longer", *run, "max_steps=5")
    assert "is finished" in capsys.readouterr().out
    assert "max_steps: 5 -> 4" in refusal(root, "run=longer", *run, "max_steps=4")
    assert "seed: 42 -> 1" in refusal(root, "run=longer", *run, "max_steps=9", "seed=1")
    rule = ("max_steps=null", "stage.tokens_per_param=0.004")
    assert "set a larger one" in refusal(root, "run=longer", *run, *rule, "stage.extend=true")
    assert "max_steps: 5 -> null" in refusal(root, "run=longer", *run, *rule)
    for file in (root / "longer" / "pretrain" / "checkpoints").glob("*.ckpt"):
        file.unlink()
    assert "no checkpoint of step 5" in refusal(root, "run=longer", *run, "max_steps=9")
    assert record(root, "longer")["status"] == "finished"


def test_two_names_of_one_parent_are_one_configuration():
    def missing(_):
        raise UserError("there is no such run")

    origin, config = {"config": {"init_from": None, "seed": 1}, "parent": "/runs/a/pretrain/model"}, {"seed": 1}
    same, other = Path(origin["parent"]), Path("/b")
    for find, keys in ((lambda _: same, []), (lambda _: other, ["init_from"]), (missing, ["init_from"])):
        differences = differing(origin, config | {"init_from": "a/pretrain"}, (), find)
        assert [key for key, _, _ in differences] == keys
    assert differing(origin, config | {"init_from": None}, (), missing) == []  # nothing is looked for


def test_scores_of_weights_that_go_are_set_aside(tmp_path, capsys):
    """Where a finished stage goes on, and at its end those that were measured meanwhile."""
    cfg = compose("train", "experiment=tiny", f"paths.runs={tmp_path}", "run=demo")
    job = Job(cfg, stage_row("pretrain"), RunDir(tmp_path, "demo"), OmegaConf.to_container(cfg, resolve=True), None)
    job.manifest["horizons"] = [3]  # as `begin_longer` notes it

    def measure(bpb):
        for name in (*ITEM_FOLDERS, OTHER_DATA):
            (job.stage_dir / name).mkdir(parents=True)
        for name in ("core.csv", "records/choice.jsonl"):
            (job.stage_dir / name).write_text("")
        write_json(job.stage_dir / "eval.json", {"bpb": bpb})

    measure(2.0)
    job.begin()
    assert not any((job.stage_dir / name).exists() for name in SCORE_FILES)
    measure(2.1)
    job.finish({"steps": 5}, 1.0)
    assert capsys.readouterr().out.count("scores of the weights of step 3 are set aside") == 2
    assert stage_row_of(job.stage_dir).get("bpb") is None and record(tmp_path, "demo")["horizons"] == [3, 5]
    for name, bpb in (("scores_of_step_3", 2.0), ("scores_of_step_3_more", 2.1)):
        assert read_scores(job.stage_dir / name) == {"bpb": bpb}
        assert sorted(path.name for path in (job.stage_dir / name).iterdir()) == sorted(SCORE_FILES)


def test_the_seed_decides_the_first_weights_and_the_order_of_conversations(tokenizer_runs):
    """Lets results scatter over seeds: what is said of their spread would be 0 where the seed reaches nothing."""

    def config(stage, seed):
        return compose("train", "experiment=tiny", "trainer=cpu", f"stage={stage}", f"seed={seed}")

    tokenizer = tokenizer_runs / "tiny" / "tokenizer" / "model"
    nets = [pretrain.build(config("pretrain", seed), tokenizer).module.net for seed in (1, 2, 1)]
    first, second, again = (net.transformer.wte.weight for net in nets)
    assert torch.equal(first, again) and not torch.equal(first, second)
    orders = [finetune.mixtures(config("sft", seed))[0].order.tolist() for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1])
