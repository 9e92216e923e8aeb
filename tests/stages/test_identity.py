"""What a stage begins with is known by its content: nothing else is resumed, evaluated, served or started from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_training
import torch
from conftest import compose, run_cli
from omegaconf import OmegaConf

from llm.checkpoint.hf_model import load_hf
from llm.checkpoint.model_folder import save_model_folder
from llm.checkpoint.resume import checkpoint_path, inspect, list_checkpoints, load_checkpoint, origins
from llm.config.stages import stage_row
from llm.errors import UserError
from llm.eval.evaluate import StageSubject
from llm.model.gpt import GPT
from llm.run.content import fingerprints, write_content
from llm.run.formats import FORMAT
from llm.run.stage_folder import RunDir, read_manifest, write_manifest
from llm.scaling.rules import model_config
from llm.serving import app
from llm.serving.chat import load_chat_model
from llm.stages.common import load_parent, load_tokenizer
from llm.stages.job import Job
from llm.stages.parents import check_same_origin, find_parents, is_one_model
from llm.stages.run_stage import is_finished
from llm.stages.same_files import check_same_files
from llm.tokenizer.bpe import Tokenizer
from llm.utils import environment

TINY = ("experiment=tiny", "model.depth=1")


def config(root, stage, *more):
    return compose("train", *TINY, f"stage={stage}", f"paths.runs={root}", *more)


def job_of(root, stage, *more) -> Job:
    """The work on a stage of the run `tiny`, after its parents were found and before they are compared."""
    cfg = config(root, stage, *more)
    run, row = RunDir(cfg.paths.runs, cfg.run), stage_row(cfg.stage.name)
    return Job(cfg, row, run, OmegaConf.to_container(cfg, resolve=True), *find_parents(cfg, row, run))


def finish(root, stage, seed):
    """Leave the stage as training does, with initial weights of `seed`."""
    job, tokenizer = job_of(root, stage), Tokenizer.load(root / "tiny" / "tokenizer" / "model")
    net = GPT(model_config(job.cfg.model, job.cfg.arch, tokenizer.vocab_size)).init_weights(seed)
    with torch.no_grad():
        net.lm_head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    save_model_folder(job.stage_dir / "model", net, tokenizer)
    own = {"status": "finished", "finished": stage, "fingerprints": fingerprints(job.stage_dir / "model")}
    write_manifest(job.stage_dir, job.manifest | own)


def begin(root, stage, *more):
    """Leave the stage as a training that was killed after its second checkpoint, without their tensors."""
    job = job_of(root, stage, *more)
    job.begin()
    for step in (2, 4):
        save(job, step, job.origin)


def save(job, step, origin):
    path = checkpoint_path(job.stage_dir / "checkpoints", step)
    path.parent.mkdir(exist_ok=True)
    torch.save({"global_step": step, "fathom": {"origin": origin}}, path)


@pytest.fixture(scope="module", autouse=True)
def one_commit():
    """The source tree may change while tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "git_commit", lambda: "b" * 40)
        yield


@pytest.fixture(scope="module")
def runs_once(tokenizer_runs, tmp_path_factory):
    root = shutil.copytree(tokenizer_runs, tmp_path_factory.mktemp("identity") / "runs")
    finish(root, "pretrain", 0)
    finish(root, "midtrain", 1)
    return root


@pytest.fixture
def runs(runs_once, tmp_path):
    """runs/tiny with a finished tokenizer, pretrain and midtrain."""
    return shutil.copytree(runs_once, tmp_path / "runs")


def go_on(root, *more) -> Job:
    """Check an unfinished stage with the configuration that would go on with it."""
    job = job_of(root, *more)
    assert not is_finished(job.run, job.row.name, job.config, job.cfg)
    check_same_origin(job)
    return job


def test_an_unfinished_stage_goes_on_from_parents_whose_folders_have_other_names(runs):
    child = ("distill", "run=child", "stage.source=data")
    begin(runs, *child, "init_from=tiny/pretrain", "stage.teacher=tiny/midtrain")
    (runs / "tiny").rename(runs / "moved")
    names = ("init_from=moved/pretrain", "stage.teacher=moved/midtrain")
    go_on(runs, *child, *names).begin()
    record = read_manifest(runs / "child" / "distill")
    assert record["config"]["init_from"] == "moved/pretrain" and record["parent"].endswith("moved/pretrain/model")
    assert record["further"]["stage.teacher"][0].endswith("moved/midtrain/model")
    go_on(runs, *child, *names)
    with pytest.raises(UserError, match="stage.teacher: moved/midtrain -> moved/pretrain"):
        go_on(runs, *child, names[0], "stage.teacher=moved/pretrain")
    with pytest.raises(UserError, match="init_from: moved/pretrain -> moved/midtrain"):
        go_on(runs, *child, "init_from=moved/midtrain", names[1])


def test_names_of_models_are_compared_by_what_they_hold(runs):
    """Compare lists item by item; a tokenizer alone is not the model with that tokenizer."""
    first, other, bare = (runs / "tiny" / stage / "model" for stage in ("pretrain", "midtrain", "tokenizer"))
    key, keys = "stage.teachers", ("stage.teachers.0", "stage.teachers.1")
    further = {name: ["/gone", None] for name in keys}
    parents = {keys[0]: fingerprints(first), keys[1]: fingerprints(other)}
    origin = {"parent": "/gone", "further": further, "parents": parents}
    assert is_one_model(origin, key, ["a", "b"], ["c", "d"], {keys[0]: first, keys[1]: other}.get)
    assert not is_one_model(origin, key, ["a", "b"], ["d", "c"], {keys[0]: other, keys[1]: first}.get)
    assert not is_one_model(origin, key, ["a", "b"], ["c"], {keys[0]: first}.get)
    assert not is_one_model(origin, key, ["a", "b"], ["c", "d"], {keys[0]: first}.get)
    assert not is_one_model(origin, "init_from", "a", "c", {"init_from": first}.get)  # an older release kept no sums
    assert not is_one_model(origin, "seed", 1, 2, {}.get)
    alone = origin | {"parents": {"init_from": fingerprints(bare)}}
    assert is_one_model(alone, "init_from", "a", "c", {"init_from": bare}.get)
    assert not is_one_model(alone, "init_from", "a", "c", {"init_from": first}.get)


def put_other_tokenizer(folder):
    """Train a tokenizer of the same size on another text into a model/ folder."""
    size = Tokenizer.load(folder).vocab_size
    Tokenizer.train([f"{n} other words of another text, said {n * n} times" for n in range(500)], size).save(folder)


def put_other_weights(root, listed=True):
    """Copy the weights of tiny/midtrain over those of tiny/pretrain, with the list of checksums or without it."""
    for name in ("model.safetensors", *(["manifest.json"] if listed else [])):
        shutil.copy(root / "tiny/midtrain/model" / name, root / "tiny/pretrain/model" / name)


@pytest.mark.parametrize("listed", [True, False])
def test_an_unfinished_stage_is_not_resumed_from_another_tokenizer(runs, listed):
    shutil.rmtree(runs / "tiny" / "pretrain")
    begin(runs, "pretrain")
    folder = runs / "tiny" / "tokenizer" / "model"
    check_same_origin(job_of(runs, "pretrain"))
    put_other_tokenizer(folder)
    if listed:
        write_content(folder)
    with pytest.raises(UserError, match=f"begun from another version of {folder}.*another tokenizer.*put that"):
        check_same_origin(job_of(runs, "pretrain"))


@pytest.mark.parametrize("listed", [True, False])
def test_an_unfinished_stage_is_not_resumed_from_other_weights(runs, listed):
    begin(runs, "sft", "init_from=tiny/pretrain")
    check_same_origin(job_of(runs, "sft", "init_from=tiny/pretrain"))
    put_other_weights(runs)
    if not listed:
        (runs / "tiny/pretrain/model/manifest.json").unlink()
    job = job_of(runs, "sft", "init_from=tiny/pretrain")
    with pytest.raises(UserError, match=f"begun from another version of {job.parent}.*other weights.*put that"):
        check_same_origin(job)


def change_second(folder):
    (folder / "b.txt").write_text("Another story, of fewer words.\n")


@pytest.mark.parametrize(
    "change,said",
    [
        (change_second, "b.txt has changed"),
        (lambda folder: (folder / "b.txt").write_text("b" + (folder / "b.txt").read_text()[1:]), "b.txt has changed"),
        (lambda folder: (folder / "c.txt").unlink(), "c.txt is missing"),
        (lambda folder: shutil.copy(folder / "b.txt", folder / "d.txt"), "d.txt is new"),
        (lambda folder: (folder / "a.txt").rename(folder / "aa.txt"), "aa.txt is in the place of a.txt"),
    ],
    ids=["size", "content", "missing", "new", "name"],
)
def test_an_unfinished_stage_is_not_resumed_with_other_text(runs, tmp_path, change, said):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"The story of {name}, told again and again.\n" * 9)
    more = ("data=local", f"data.path={folder}", "init_from=tiny/tokenizer", "run=other")
    job = job_of(runs, "pretrain", *more)
    check_same_files(job)
    job.begin()
    save(job, 2, job.origin)
    (folder / "a.txt").touch()  # a copy has other times
    check_same_files(job_of(runs, "pretrain", *more))
    change(folder)
    with pytest.raises(UserError, match=rf"begun with other text: {said}\. Put the files back, or overwrite=true"):
        check_same_files(job_of(runs, "pretrain", *more))
    check_same_files(job_of(runs, "pretrain", *more, "overwrite=true"))
    write_manifest(job.stage_dir, {key: value for key, value in job.manifest.items() if key != "texts"})
    check_same_files(job_of(runs, "pretrain", *more))  # an older release began it


@pytest.fixture
def files(tmp_path):
    """Return a folder with three files of text and a list of token ids, and one of rows."""
    folder = tmp_path / "files"
    for part in ("texts", "ids"):
        (folder / part).mkdir(parents=True)
    for name in "abc":
        (folder / "texts" / f"{name}.txt").write_text(f"The story of {name}, told again and again.\n" * 9)
        np.arange(900, dtype=np.uint16).tofile(folder / "ids" / f"{name}.bin")
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 20)
    pair = {"prompt": "Who?", "chosen": "I.", "rejected": "Nobody."}
    (folder / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 20)
    return folder


@pytest.mark.parametrize(
    "stage,name,more",
    [
        ("pretrain", "texts/b.txt", ["data=mixture", "+data.sources.one.path={files}/texts"]),
        ("pretrain", "ids/b.bin", ["data=tokens", "data.path={files}/ids"]),
        ("sft", "rows.jsonl", ["data.tasks.smalltalk.source=local", "data.tasks.smalltalk.train={files}/rows.jsonl"]),
        (
            "grpo",
            "rows.jsonl",
            ["data.tasks.arithmetic.source=local", "data.tasks.arithmetic.train={files}/rows.jsonl"],
        ),
        (
            "dpo",
            "pairs.jsonl",
            ["data.preferences.brevity.source=local", "data.preferences.brevity.train={files}/pairs.jsonl"],
        ),
    ],
)
def test_an_unfinished_stage_is_not_resumed_with_other_files(runs, files, stage, name, more):
    more = [word.format(files=files) for word in more]
    more += ["run=other", f"init_from=tiny/{'tokenizer' if stage == 'pretrain' else 'pretrain'}"]
    job = job_of(runs, stage, *more)
    check_same_files(job)
    job.begin()
    save(job, 2, job.origin)
    check_same_files(job_of(runs, stage, *more))
    with open(files / name, "ab") as file:
        file.write(b" \n")
    what = "text" if stage == "pretrain" else "rows"
    with pytest.raises(
        UserError, match=rf"begun with other {what}: {Path(name).name} has changed\. Put the files back"
    ):
        check_same_files(job_of(runs, stage, *more))


def test_a_stage_on_another_disk_is_begun_anew_there(runs, tmp_path):
    begin(runs, "sft")
    (runs / "tiny" / "sft").rename(tmp_path / "disk")
    (runs / "tiny" / "sft").symlink_to(tmp_path / "disk")
    job_of(runs, "sft", "overwrite=true").begin()
    assert (runs / "tiny" / "sft").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["config.yaml", "run.json"]


def test_a_parent_trained_again_to_the_same_weights_is_the_same_parent(runs):
    begin(runs, "sft")
    record = read_manifest(runs / "tiny" / "pretrain")
    write_manifest(runs / "tiny" / "pretrain", record | {"finished": "later"})
    check_same_origin(job_of(runs, "sft"))


def test_another_parent_ends_the_command_in_one_line_and_changes_nothing(runs):
    shutil.rmtree(runs / "tiny" / "pretrain")
    begin(runs, "pretrain")
    put_other_tokenizer(runs / "tiny" / "tokenizer" / "model")
    before = read_manifest(runs / "tiny" / "pretrain")
    done = run_cli("train.py", *TINY, "stage=pretrain", f"paths.runs={runs}")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert read_manifest(runs / "tiny" / "pretrain") == before


def test_checkpoints_tell_without_run_json_what_they_began_from(runs):
    begin(runs, "sft")
    (runs / "tiny/sft/run.json").unlink()
    check_same_origin(job_of(runs, "sft"))
    shutil.copytree(runs / "tiny/pretrain/model", runs / "tiny/midtrain/model", dirs_exist_ok=True)
    with pytest.raises(UserError, match="step_000002.ckpt: this stage was begun from another version of .*/midtrain/"):
        check_same_origin(job_of(runs, "sft"))


@pytest.mark.parametrize("change", ["seed=7", "data.mixture.sft.choice=3.0", "optim.matrix_lr=0.5"])
def test_a_checkpoint_of_another_training_is_not_resumed(runs, change):
    begin(runs, "sft")
    save(job_of(runs, "sft"), 4, job_of(runs, "sft", change).origin)
    key, value = change.split("=")
    with pytest.raises(UserError, match=rf"step_000004.ckpt was saved by .*\({key}: {value} -> .*put the checkpoints"):
        check_same_origin(job_of(runs, "sft"))


@pytest.mark.parametrize("change", ["max_steps=2", "save_every=7", "data.workers=1", "batch.micro_batch_size=1"])
def test_a_checkpoint_of_a_shorter_or_otherwise_placed_training_is_resumed(runs, change):
    begin(runs, "sft")
    save(job_of(runs, "sft"), 4, job_of(runs, "sft", change).origin)
    check_same_origin(job_of(runs, "sft"))


def test_checkpoints_of_older_releases_and_damaged_ones_are_no_reason_to_refuse(runs):
    begin(runs, "sft")
    save(job_of(runs, "sft"), 2, {})
    (runs / "tiny/sft/checkpoints/step_000006.ckpt").write_bytes(b"half a checkpoint")
    path = runs / "tiny/sft/checkpoints/step_000004.ckpt"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"seed", b"seeD"))
    assert origins(path.parent) == []
    check_same_origin(job_of(runs, "sft"))
    path.write_bytes(content)
    assert [file.name for file, _ in origins(path.parent)] == [path.name]


def test_real_checkpoints_carry_their_origin_and_resume(tmp_path):
    module = small_training.make_module()
    module.origin = {"stage": "pretrain", "config": {"seed": 1}}
    straight, _ = small_training.fit(tmp_path / "a", module=module)
    assert [origin for _, origin in origins(tmp_path / "a/checkpoints")] == [module.origin] * 2
    (_, first), _ = list_checkpoints(tmp_path / "a/checkpoints")
    assert "origin" in load_checkpoint(first)["fathom"]
    again, _ = small_training.fit(tmp_path / "b", ckpt=first)
    assert all(a.equal(b) for a, b in zip(straight.parameters(), again.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# What is said and refuses nothing


def resume(root):
    check_same_origin(job_of(root, "sft"))


def notes(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: /")]


def made_by(root, stage, **code):
    """Let run.json of a stage name other code."""
    folder = root / "tiny" / stage
    write_manifest(folder, read_manifest(folder) | code)


@pytest.mark.parametrize("use", ["resume", "evaluate", "serve"])
def test_other_code_is_named_in_one_line_and_no_reason_to_refuse(use, runs, capsys):
    begin(runs, "sft")
    {"resume": resume, "evaluate": evaluate, "serve": serve}[use](runs)
    assert notes(capsys) == []
    made_by(runs, "pretrain", version="0.0.1", commit="a" * 40 + "-dirty")
    other = job_of(runs, "sft").origin | {"version": "0.0.1", "commit": "a" * 40 + "-dirty"}
    save(job_of(runs, "sft"), 4, other)
    {"resume": resume, "evaluate": evaluate, "serve": serve}[use](runs)
    (said,) = notes(capsys)
    assert said.startswith(f"note: {runs}/tiny/")
    assert "made by other code: Fathom 0.0.1, commit aaaaaaaaaaaa-dirty; this is Fathom " in said


def test_code_that_is_not_known_is_not_taken_for_other_code(runs, capsys):
    for unknown in ({"version": None, "commit": None}, {"commit": None}):
        made_by(runs, "pretrain", **unknown)
        serve(runs)
    assert notes(capsys) == []


def without_fingerprints(root, stage):
    """Make a stage such as older releases left it."""
    folder = root / "tiny" / stage
    record = {key: value for key, value in read_manifest(folder).items() if key not in ("fingerprints", "parents")}
    write_manifest(folder, record)
    (folder / "model" / "manifest.json").unlink(missing_ok=True)
    for step in (2, 4) if (folder / "checkpoints").is_dir() else ():
        save(job_of(root, stage), step, {})


def test_an_old_folder_is_evaluated_served_resumed_and_started_from_with_one_line(runs, capsys):
    begin(runs, "sft")
    for stage in ("pretrain", "sft"):
        without_fingerprints(runs, stage)
    for use in (evaluate, serve, start_from):
        use(runs)
        (said,) = notes(capsys)
        assert f"{runs}/tiny/pretrain/model: nothing of it could be compared" in said
        assert "no manifest.json and no fingerprints in run.json" in said
    resume(runs)
    (said,) = notes(capsys)
    assert f"note: {runs}/tiny/sft keeps no fingerprints" in said
    assert f"whether {runs}/tiny/midtrain/model has changed since could not be compared" in said


def test_of_half_of_the_lists_the_line_says_what_is_left(runs, capsys):
    (runs / "tiny/pretrain/model/manifest.json").unlink()
    made_by(runs, "midtrain", fingerprints=None)
    serve(runs)
    load_chat_model(runs / "tiny" / "midtrain")
    first, second = notes(capsys)
    assert "pretrain/model: only tokenizer and weights could be compared" in first and "(no manifest.json: " in first
    assert "midtrain/model: not all of it could be compared" in second and "(no fingerprints in run.json: " in second


def evaluate(root, *more):
    cfg = compose("evaluate", "run=tiny", f"paths.runs={root}", *more)
    cfg.stage = "pretrain"
    StageSubject(cfg)


def load_folder(root, *more):
    cfg = compose("evaluate", *more)
    load_hf(f"{root}/tiny/pretrain/model", None, "cpu", cfg.verify)


def serve(root, *more):
    cfg = compose("serve", "run=tiny", "prompt=a", "max_new_tokens=1", f"paths.runs={root}", *more)
    cfg.stage = "pretrain"
    app.serve(cfg)


def start_from(root, *more):
    load_parent(root / "tiny/pretrain/model", config(root, "sft", *more))


@pytest.mark.parametrize("use", [evaluate, serve, start_from])
@pytest.mark.parametrize("listed", [True, False])
def test_weights_of_another_stage_are_refused_by(use, listed, runs):
    use(runs)
    put_other_weights(runs, listed)
    with pytest.raises(UserError, match=f"{runs}/tiny/pretrain/model.*(put the files of this|copy the folder again)"):
        use(runs)


@pytest.mark.parametrize("listed", [True, False])
def test_a_tokenizer_that_its_stage_did_not_train_is_refused_by_a_fresh_network(listed, runs):
    folder, cfg = runs / "tiny" / "tokenizer" / "model", config(runs, "pretrain")
    load_tokenizer(folder, cfg)
    put_other_tokenizer(folder)
    if listed:
        write_content(folder)
    with pytest.raises(UserError, match=f"{folder}.*(holds another tokenizer .* than its stage|is not what was)"):
        load_tokenizer(folder, cfg)


@pytest.mark.parametrize("use", [evaluate, load_folder, serve, start_from])
def test_a_flipped_bit_is_found_and_with_verify_false_not_looked_for(use, runs):
    path = runs / "tiny/pretrain/model/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors is not what was written"):
        use(runs)
    use(runs, "verify=false")


@pytest.mark.parametrize("use", [evaluate, serve, start_from])
def test_with_verify_false_other_weights_are_found_by_their_list(use, runs):
    put_other_weights(runs)
    with pytest.raises(UserError, match="pretrain/model holds other weights .* than its stage handed over"):
        use(runs, "verify=false")


# ---------------------------------------------------------------------------------------------------------------------
# Formats of other releases

USES = {"evaluate": evaluate, "serve": serve, "start_from": start_from}


@pytest.mark.parametrize("use", USES)
def test_a_folder_of_a_later_release_is_refused_whatever_else_it_holds(use, runs):
    made_by(runs, "pretrain", format=FORMAT + 1, status=["what a later release may write"], config=5)
    with pytest.raises(UserError, match=rf"pretrain/run.json: a later release .*\(format {FORMAT + 1}; .*: use that"):
        USES[use](runs)


def test_a_later_checkpoint_is_not_resumed(runs):
    begin(runs, "sft")
    save(job_of(runs, "sft"), 6, job_of(runs, "sft").origin | {"format": FORMAT + 1, "parents": 5})
    with pytest.raises(UserError, match=r"step_000006.ckpt: origin: a later release of Fathom wrote it"):
        check_same_origin(job_of(runs, "sft"))


@pytest.mark.parametrize("number", [None, FORMAT])
def test_folders_of_this_release_and_without_a_number_are_read(number, runs):
    folder = runs / "tiny" / "pretrain"
    record = {key: value for key, value in read_manifest(folder).items() if key != "format"}
    write_manifest(folder, record if number is None else record | {"format": number})
    for use in USES.values():
        use(runs)
    assert read_manifest(folder).get("format") == number


# ---------------------------------------------------------------------------------------------------------------------
# make inspect


def inspected(root, capsys) -> dict[str, str]:
    """Return what `make inspect` says of every stage's model/ folder, and whether it finds all of them sound."""
    is_sound, said, stage = inspect(root / "tiny"), {}, ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("tiny/"):
            stage = line.partition(":")[0].removeprefix("tiny/")
        elif "  model/" in line:
            said[stage] = line
    return said | {"sound": is_sound}


def test_inspect_tells_sound_models_from_others(runs, capsys):
    said = inspected(runs, capsys)
    assert said.pop("sound") and list(said) == ["tokenizer", "pretrain", "midtrain"]
    assert all(line.endswith("every file is as it was written") for line in said.values())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "chat_template.jinja", "tokenizer.tiktoken"])
def test_inspect_names_the_file_with_a_flipped_bit(name, runs, capsys):
    path = runs / "tiny/pretrain/model" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    said = inspected(runs, capsys)
    assert not said["sound"] and "DAMAGED: " in said["pretrain"] and name in said["pretrain"]
    assert "every file" in said["tokenizer"] and "every file" in said["midtrain"]


def test_inspect_says_what_was_swapped_or_is_not_listed(runs, capsys):
    put_other_weights(runs)
    put_other_tokenizer(runs / "tiny/tokenizer/model")
    (runs / "tiny/midtrain/model/manifest.json").unlink()
    said = inspected(runs, capsys)
    assert not said["sound"] and "DAMAGED" not in said["midtrain"] and "no manifest.json" in said["midtrain"]
    assert "DAMAGED: " in said["pretrain"] and "holds other weights" in said["pretrain"]
    assert "DAMAGED: " in said["tokenizer"] and "is not what was written" in said["tokenizer"]
    without_fingerprints(runs, "midtrain")
    assert "nothing of it could be compared" in inspected(runs, capsys)["midtrain"]
