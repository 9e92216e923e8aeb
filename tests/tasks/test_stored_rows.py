"""Task rows at addresses of a store: those of the same files on disk."""

import gzip
import json
import zipfile

import pytest
from hub_server import Hub
from omegaconf import OmegaConf
from store_server import put_folder, s3_server

from llm.errors import UserError
from tasks import Cache, build_task
from tasks.base import dialogue
from tasks.registry import has_split, local_files


@pytest.fixture(scope="module")
def s3():
    with s3_server() as client:
        yield client


def lines(name, count) -> bytes:
    rows = [{"messages": dialogue(f"{name} {number}", "Yes.")} for number in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def chats(tmp_path):
    folder = tmp_path / "chat"
    (folder / "more").mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(lines("train", 5))
    (folder / "more/packed.jsonl.gz").write_bytes(gzip.compress(lines("packed", 4)))
    (folder / "val.jsonl").write_bytes(lines("val", 3))
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        archive.writestr("inside.jsonl", lines("inside", 2))
    return folder


def spec(train, **keys):
    return OmegaConf.create({"type": "chat", "source": "local", "train": str(train), "test": None} | keys)


def questions(train, split="train", **keys) -> list[str]:
    task = build_task("talk", spec(train, **keys), split)
    return [talk["messages"][0]["content"] for talk in task]


@pytest.mark.parametrize("split, count", [("train", 11), ("test", 3)])
def test_a_folder_is_divided_as_on_disk(s3, chats, tmp_path, split, count):
    address = put_folder(s3, chats, tmp_path.name)
    assert questions(address, split) == questions(chats, split)
    assert len(questions(address, split)) == count
    assert has_split("talk", spec(address), "test")


@pytest.mark.parametrize(
    "entry, keys",
    [
        ("/*/*.gz", {}),
        ("/train.jsonl[:3]", {"test": "{root}/train.jsonl[3:]"}),
        ("/all.zip", {}),
        ("/more", {"test": "25%"}),
        ("", {"test": "{root}/train.jsonl"}),
    ],
)
def test_patterns_parts_archives_and_shares(s3, chats, tmp_path, entry, keys):
    address = put_folder(s3, chats, tmp_path.name)
    for split in ("train", *(["test"] if keys else [])):
        here, there = (
            questions(f"{root}{entry}", split, **{key: value.format(root=root) for key, value in keys.items()})
            for root in (chats, address)
        )
        assert there == here != []


def test_what_is_not_there_names_key_and_address(s3):
    with pytest.raises(UserError, match=r"data\.tasks\.talk\.train=s3://bucket/none\.jsonl: there is no such file"):
        questions("s3://bucket/none.jsonl")
    local_files({"talk": spec("s3://bucket/none.jsonl")}, ["talk"], "train")  # opens and asks nothing


def test_bad_rows_in_a_store_are_named(s3, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(lines("x", 2) + b'{"messages": 3}\n')
    address = put_folder(s3, tmp_path, tmp_path.name)
    with pytest.raises(UserError, match=r"data\.tasks\.talk\.train: s3://bucket/.*/bad\.jsonl row 3"):
        questions(f"{address}/bad.jsonl")


def test_secrets_of_a_web_address_are_not_shown(tmp_path, capsys):
    with Hub({}) as web:
        web.web["/talks.jsonl"] = lines("x", 2)
        task = build_task("talk", spec(f"{web.url}/talks.jsonl?key=hush"), "train", Cache(tmp_path))
        with pytest.raises(UserError, match="answers 404") as error:
            build_task("talk", spec(f"{web.url}/none.jsonl?key=hush"), "train", Cache(tmp_path))
    assert len(task) == 2 and "hush" not in capsys.readouterr().out + str(error.value)
