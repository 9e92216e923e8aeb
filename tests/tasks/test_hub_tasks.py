"""Tasks whose rows are data sets of the hub or files of the web, against a hub of our own."""

import io
import json
import multiprocessing
import re
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import compose, run_cli
from hub_server import COMMIT, Hub, point_to
from processes import HANG

from llm.data.download import WebFile
from llm.errors import UserError
from llm.stages.run_stage import run_stage
from tasks import Cache, build_task
from tasks import hub as tasks_hub
from tasks.base import dialogue

TALK = "people/talk"
WORDS = "/words.txt"


def parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chats(n, start=0):
    return [{"messages": dialogue(f"Say {i}.", f"{i}."), "source": "made"} for i in range(start, start + n)]


def card(**configs):
    """A data card that names the files of every configuration: `card(main={"train": "main/train.parquet"})`."""
    named = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in configs.items()
    ]
    return f"---\nconfigs: {json.dumps(named)}\n---\nabout the data".encode()


def asked(task):
    return [conversation["messages"][0]["content"] for conversation in task]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with 30 and 6 conversations in parquet files, and a list of words at an address of its own."""
    with Hub({}) as hub:
        hub.sets[TALK] = {
            "data/train-00000-of-00002.parquet": parquet(chats(20)),
            "data/train-00001-of-00002.parquet": parquet(chats(10, 20)),
            "data/test-00000-of-00001.parquet": parquet(chats(6, 100)),
            "README.md": b"about the data",
        }
        hub.web[WORDS] = "\r\n".join(f"word{chr(97 + i)}{chr(97 + j)}" for i in range(26) for j in range(4)).encode()
        point_to(hub, monkeypatch, tmp_path / "hf")
        yield hub


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def spec(kind="chat", repo=TALK, train="train", test="test", **more):
    return {"type": kind, "source": "hub", "repo": repo, "train": train, "test": test, **more}


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_rows_of_both_splits_in_their_published_order(hub, cache):
    assert asked(build_task("talk", spec(), "train", cache)) == [f"Say {i}." for i in range(30)]
    assert asked(build_task("talk", spec(), "test", cache)) == [f"Say {i}." for i in range(100, 106)]


def test_what_is_here_needs_no_hub_and_is_read_from_memory_mapped_files(hub, cache, monkeypatch):
    build_task("talk", spec(), "train", cache)
    count = len(hub.requests)
    task = build_task("talk", spec(), "test", Cache(cache.folder, may_fetch=False))
    assert len(hub.requests) == count and len(task) == 6
    folder = cache.folder / "tasks" / "people--talk" / "main" / "default"
    assert json.loads((folder / "fathom.json").read_text())["commit"] == COMMIT
    assert sorted(path.name for path in folder.iterdir()) == [".parts", "fathom.json", "test", "train"]
    mapped = {file["filename"] for file in task.rows._rows.cache_files}
    assert mapped == set(map(str, (folder / "test").glob("*.arrow")))


def test_order_is_that_of_the_librarys_shuffle(hub, cache):
    published = tasks_hub.HubTask(TALK, None, None, "key", cache).load("train", "train")
    shuffled = build_task("talk", spec(shuffle_seed=42), "train", cache)
    assert asked(shuffled) == [row["messages"][0]["content"] for row in published.shuffle(seed=42)]
    assert asked(build_task("talk", spec(shuffle_seed=42, limit=5), "train", cache)) == asked(shuffled)[:5]


@pytest.mark.parametrize(
    ("split", "rows"),
    [("train[:4]", [0, 1, 2, 3]), ("train[-2:]", [28, 29]), ("train[:10%]+test[:1]", [0, 1, 2, 100])],
)
def test_slices_and_sums_of_splits(hub, cache, split, rows):
    talk = build_task("talk", spec(train=split, test="test[5:]"), "train", cache)
    assert asked(talk) == [f"Say {i}." for i in rows]


def test_subsets_and_the_rows_of_the_public_sets(hub, cache):
    arc = {"id": "1", "question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    mmlu = {"question": "Q?", "subject": "law", "choices": ["w", "x", "y", "z"], "answer": 2}
    hub.sets["quiz/all"] = {
        "easy/train.parquet": parquet([arc] * 3),
        "easy/test.parquet": parquet([arc]),
        "hard/train.parquet": parquet([mmlu] * 5),
        "wrapped/train.parquet": parquet([{"train": mmlu}] * 2),
        "README.md": card(
            easy={"train": "easy/train.parquet", "test": "easy/test.parquet"},
            hard={"auxiliary_train": "hard/train.parquet"},
            wrapped={"train": "wrapped/train.parquet"},
        ),
    }

    def quiz(subset, train):
        return build_task("quiz", spec("multiple_choice", "quiz/all", train, subset=subset), "train", cache)

    easy, hard, wrapped = quiz("easy", "train"), quiz("hard", "auxiliary_train"), quiz("wrapped", "train")
    assert (len(easy), len(hard), len(wrapped)) == (3, 5, 2)
    assert easy[0]["letters"] == ("1", "2") and easy[0]["messages"][-1]["content"] == "2"
    assert hard[4]["letters"] == tuple("ABCD") and hard[4] == wrapped[0] and hard[4]["subject"] == "law"


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Say 0."}, {"from": "gpt", "value": "0."}]},
        {"instruction": "Say 0.", "input": "", "output": "0."},
        {"messages": [{"role": "user", "content": "Say 0."}, {"role": "assistant", "content": "0."}], "more": None},
    ],
)
def test_chat_formats_of_the_hub(hub, cache, row):
    repo = f"formats/{next(iter(row))}"
    hub.sets[repo] = {"train.jsonl": jsonl([row])}
    assert build_task("talk", spec(repo=repo), "train", cache)[0] == {"messages": dialogue("Say 0.", "0.")}


def test_first_rows_are_checked_before_anything_runs_and_the_rest_when_they_are_read(hub, cache, monkeypatch):
    monkeypatch.setattr(tasks_hub, "CHECKED", 10)
    bad = {"messages": [{"role": "narrator", "content": "Once."}], "source": "made"}
    hub.sets["people/late"] = {"train.parquet": parquet([*chats(20), bad])}
    hub.sets["people/soon"] = {"train.parquet": parquet([*chats(5), bad, *chats(9)])}
    task = build_task("talk", spec(repo="people/late"), "train", cache)
    assert asked([task[19]]) == ["Say 19."]
    where = r"data\.tasks\.talk\.train: people/%s train row %d: message 1 has role 'narrator'"
    with pytest.raises(UserError, match=where % ("late", 21)):
        task[20]
    with pytest.raises(UserError, match=where % ("soon", 6)):
        build_task("talk", spec(repo="people/soon"), "train", cache)
    assert len(build_task("talk", spec(repo="people/soon", limit=5), "train", cache)) == 5
    monkeypatch.setattr(tasks_hub, "CHECKED", 1)
    shuffled = build_task("talk", spec(repo="people/late", shuffle_seed=42), "train", cache)
    with pytest.raises(UserError, match=where % ("late", 21)):  # its place in the file, not in the order
        list(shuffled)


def test_a_revision_has_a_folder_of_its_own(hub, cache):
    hub.revisions.add("refs/convert/parquet")
    assert len(build_task("talk", spec(revision="refs/convert/parquet"), "train", cache)) == 30
    assert (cache.folder / "tasks/people--talk/refs--convert--parquet/default/fathom.json").is_file()


# ---- several processes ----------------------------------------------------------------------------------------------


def count_rows(url, folder, results):
    with pytest.MonkeyPatch.context() as patch:
        point_to(type("Address", (), {"url": url}), patch, folder / "hf")
        results.put(len(build_task("talk", spec(), "train", Cache(folder / "cache"))))


@pytest.mark.slow
def test_processes_of_a_machine_fetch_once(hub, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=count_rows, args=(hub.url, tmp_path, results)) for _ in range(2)]
    try:
        for process in processes:
            process.start()
        assert [results.get(timeout=HANG) for _ in processes] == [30, 30]
        for process in processes:
            process.join(HANG)
    finally:
        for process in processes:
            process.kill()
    files = [path for path, _ in hub.downloads(".parquet")]
    assert len(files) == len(set(files)) == 3


def test_threads_and_what_a_killed_process_left(hub, cache):
    folder = cache.folder / "tasks" / "people--talk" / "main" / "default"
    for name in ("train", ".parts/done/train", ".parts/work"):
        (folder / name).mkdir(parents=True)
        (folder / name / "half.arrow").write_bytes(b"half")
    sizes = []
    threads = [
        threading.Thread(target=lambda: sizes.append(len(build_task("talk", spec(), "train", cache)))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [30, 30, 30] and not (folder / "train" / "half.arrow").exists()


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def fails(message, cache, **changes):
    with pytest.raises(UserError, match=message):
        build_task("talk", spec(**changes), "train", cache)


def test_errors_name_key_value_and_fix(hub, cache, monkeypatch):
    where = r"data\.tasks\.talk"
    hub.sets["people/gated"], hub.gated = hub.sets[TALK], {"people/gated"}
    hub.sets["people/empty"] = {"README.md": b"nothing"}
    hub.sets["people/program"] = {"program.py": b"print()", "README.md": b"made by a program"}
    hub.sets["people/broken"] = {"train.jsonl": b'{"messages": [\n'}
    hub.sets["people/two"] = {
        "a.jsonl": jsonl(chats(1)),
        "b.jsonl": jsonl(chats(2)),
        "README.md": card(first={"train": "a.jsonl"}, second={"train": "b.jsonl"}),
    }
    fails(rf"{where}\.repo=no/such: .*\(401\): .*private or gated. Correct .*HF_TOKEN", cache, repo="no/such")
    fails(rf"{where}\.repo=people/gated: .*accept its terms on its page and set HF_TOKEN", cache, repo="people/gated")
    fails(rf"{where}\.repo=words/of/one: write {where}\.repo=<owner>/<name>", cache, repo="words/of/one")
    fails(rf"{where}\.revision=v9: people/talk has no such branch", cache, revision="v9")
    two = {"repo": "people/two"}
    fails(rf"{where}\.subset=third: people/two: .*third.*\['first', 'second'\]", cache, subset="third", **two)
    fails(rf"{where}\.subset=None: people/two: .*\['first', 'second'\]", cache, **two)
    fails(rf"{where}\.train=dev: .*Its splits: train, test; .*written", cache, train="dev")
    fails(rf"{where}\.train=train\[:x\]: .*no such rows", cache, train="train[:x]")
    fails(rf"{where}\.train=train\[5:5\]: .*has no rows there", cache, train="train[5:5]")
    fails(rf"{where}\.train=None: with source=hub write a split of people/talk", cache, train=None)
    fails(rf"{where}\.repo is null: source=hub needs", cache, repo=None)
    fails(rf"{where}\.repo=people/empty: .*doesn't contain any data files", cache, repo="people/empty")
    fails(r"made by a program.*revision=refs/convert/parquet", cache, repo="people/program")
    fails(r"people/broken: its files cannot be read as rows", cache, repo="people/broken")
    fails(r"people/talk train row 1: key 'question' is missing \(found: messages, source\)", cache, kind="gsm8k")
    fails(r"source=hub: type=spelling_bee takes a list of words", cache, kind="spelling_bee")
    fails(r"options=.*files take no options", cache, options={"maker": "me"})
    for test in ("train[-5:]", "train", "test+train[29:]"):
        fails(
            rf"{where}: train=train and test={re.escape(test)} share rows, which would be trained on", cache, test=test
        )
    assert len(build_task("talk", spec(train="train[:-5]", test="train[-5:]"), "train", cache)) == 25
    with pytest.raises(UserError, match=rf"{where}.shuffle_seed=1: only source=hub reads it, not source=local"):
        build_task("talk", {"type": "chat", "source": "local", "train": "a.jsonl", "shuffle_seed": 1}, "train", cache)
    with pytest.raises(UserError, match="dry_run=true fetches nothing: run stage=download first"):
        build_task("talk", spec(revision=COMMIT), "train", Cache(cache.folder, may_fetch=False))


def test_what_passes_is_tried_again(hub, cache):
    hub.faults = [("/revision/", 500), ("/revision/", (429, 0)), ("train-00001", 503), ("test-00000", ("cut", 100))]
    assert len(build_task("talk", spec(), "train", cache)) == 30
    assert not hub.faults


def test_a_hub_that_cannot_be_reached(hub, cache, monkeypatch):
    hub.faults = [("/revision/", 403)]
    fails(r"the hub refuses it \(403\)", cache)
    hub.faults = [("/revision/", 404)]
    fails(r"no such data set or file \(404\)", cache)
    hub.faults = [("/revision/", 429)] * 100
    fails(r"data\.tasks\.talk\.repo=people/talk: the hub cannot be reached or fails, tried 6 times", cache)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    fails(r"the hub cannot be reached or fails.*Check the network or HF_ENDPOINT", cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("HF_HUB_OFFLINE is set", cache)


# ---- files of the web -----------------------------------------------------------------------------------------------


def test_a_file_of_the_web_is_fetched_once(hub, cache):
    words = {"type": "simple_spelling", "source": "local", "train": hub.url + WORDS, "size": 104, "test_size": 104}
    train, test = (set(asked(build_task("spell", words, split, cache))) for split in ("train", "test"))
    assert len(train | test) == 104 and train and test and not train & test
    assert hub.requests == [(WORDS, 0)]
    file = WebFile(hub.url + WORDS, "key", cache.folder)
    source = json.loads((file.root / "source.json").read_text())
    assert source["url"] == hub.url + WORDS and source["size"] == len(hub.web[WORDS]) and len(source["sha256"]) == 64
    file.path.write_bytes(file.path.read_bytes()[:-9])  # it lost its end
    build_task("spell", words, "train", cache)
    assert file.path.read_bytes() == hub.web[WORDS] and len(hub.requests) == 2


def test_a_broken_transfer_of_a_file_is_continued(hub, cache):
    hub.faults = [(WORDS, ("cut", 250)), (WORDS, 503)]
    file = WebFile(hub.url + WORDS, "key", cache.folder)
    assert file.fetch().read_bytes() == hub.web[WORDS] and file.is_here()
    assert not hub.faults and [start for _, start in hub.requests] == [0, 200, 0]


def test_conversations_from_an_address(hub, cache):
    hub.web["/a/mine.jsonl"], hub.web["/b/mine.jsonl"] = jsonl(chats(3)), jsonl(chats(2, 10))
    local = {"type": "chat", "source": "local", "train": [f"{hub.url}/a/mine.jsonl", f"{hub.url}/b/mine.jsonl"]}
    assert asked(build_task("talk", local, "train", cache)) == [f"Say {i}." for i in (0, 1, 2, 10, 11)]


def test_errors_of_addresses(hub, cache, monkeypatch):
    def words(url, **more):
        spec = {"type": "spelling_bee", "source": "local", "train": url}
        return build_task("bee", spec, "train", Cache(cache.folder, **more))

    where = r"data\.tasks\.bee\.train=http"
    with pytest.raises(UserError, match=where + r".*/gone\.txt: 127\.0\.0\.1 answers 404"):
        words(f"{hub.url}/gone.txt")
    with monkeypatch.context() as patch, pytest.raises(UserError, match=where + ".*HF_HUB_OFFLINE is set"):
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        words(f"{hub.url}/gone.txt")
    with pytest.raises(UserError, match=where + ".*write the whole address of a file"):
        words("https://")
    with pytest.raises(UserError, match=where + ".*dry_run=true fetches nothing: run stage=download first"):
        words(hub.url + WORDS, may_fetch=False)
    hub.faults = [(WORDS, 500)] * 100
    with pytest.raises(UserError, match=where + ".*cannot be reached or fails, tried 6 times.*give its path"):
        words(hub.url + WORDS)


# ---- the command line -----------------------------------------------------------------------------------------------


def settings(tmp_path, hub):
    """experiment=tiny without midtraining, finetuned on conversations of the hub and words of the web."""
    weights = "{choice: 0, arithmetic: 0, spelling: 0, spell_words: %s, identity: 0, smalltalk: %s}"
    spells, talks = "data.tasks.spell_words", "data.tasks.smalltalk"
    return [
        *("experiment=tiny", f"paths.runs={tmp_path}/runs", f"paths.data={tmp_path}/cache", "trainer=cpu"),
        *(f"{talks}.source=hub", f"{talks}.repo={TALK}", f"{talks}.train=train", f"{talks}.test=test"),
        *(f"{spells}.source=local", f"{spells}.train={hub.url}{WORDS}", "data.eval=[spell_words]", "data.rl=null"),
        *(f"data.mixture.midtrain={weights % (0, 0)}", f"data.mixture.sft={weights % (0.01, 1)}"),
    ]


@pytest.mark.slow
def test_finetuning_from_the_base_model_on_rows_of_the_hub(hub, tmp_path, capsys):
    args = settings(tmp_path, hub)
    for stage in ("tokenizer", "pretrain"):
        run_stage(compose("train", f"stage={stage}", *args))
    assert not hub.requests
    with pytest.raises(UserError, match=r"data\.tasks\.spell_words\.train=.*dry_run=true fetches nothing"):
        run_stage(compose("train", "stage=sft", *args, "dry_run=true"))
    run_stage(compose("train", "stage=download", *args, "dry_run=true"))
    assert capsys.readouterr().out.count("is to be fetched") == 2 and not hub.requests
    run_stage(compose("train", "stage=download", *args))
    out = capsys.readouterr().out
    assert "data.tasks.smalltalk: 30 train, 6 test" in out and "data.tasks.spell_words: 4,000 train, 256 test" in out
    count = len(hub.requests)
    run_stage(compose("train", "stage=sft", *args, "dry_run=true"))
    assert "conversations: 70" in capsys.readouterr().out
    run_stage(compose("train", "stage=sft", *args))
    out = capsys.readouterr().out
    assert "pretrain/model" in out and "Spell the word" in out and "sft finished" in out
    assert len(hub.requests) == count and (tmp_path / "runs/tiny/sft/model/model.safetensors").is_file()


def test_download_checks_every_row(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks_hub, "CHECKED", 10)
    bad = {"messages": [{"role": "narrator", "content": "Once."}], "source": "made"}
    hub.sets[TALK] = {"train.parquet": parquet([*chats(20), bad]), "test.parquet": parquet(chats(3))}
    with pytest.raises(UserError, match="data.tasks.smalltalk.train: people/talk train row 21: .*narrator"):
        run_stage(compose("train", "stage=download", *settings(tmp_path, hub)))


@pytest.mark.slow
def test_two_processes_finetune_on_rows_of_the_hub(hub, tmp_path):
    args = [*settings(tmp_path, hub), "trainer.devices=2", "batch.micro_batch_size=2"]
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    for stage in ("tokenizer", "pretrain", "sft"):
        done = run_cli("train.py", f"stage={stage}", *args, fresh=True, **env)
        assert done.returncode == 0, done.stderr
    files = [path for path, _ in hub.downloads(".parquet")]
    assert len(files) == len(set(files)) == 3 and hub.requests.count((WORDS, 0)) == 1
    more = ("overwrite=true", f"data.tasks.smalltalk.repo={TALK}x")
    wrong = run_cli("train.py", "stage=sft", *args, *more, fresh=True, **env)
    assert wrong.returncode == 2 and "error: data.tasks.smalltalk.repo=people/talkx: the hub refuses it" in wrong.stderr
