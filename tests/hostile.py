"""Mutations of a run folder, as somebody could hand one over: of JSON values, whole files, tensors and checkpoints."""

import copy
import json
import os
import random
import shutil
import struct
from pathlib import Path

import torch

from llm.checkpoint.resume import CheckpointWriter, list_checkpoints

CODE = "hostile_payload"  # module that leaves a mark where it is imported
JSON_FILES = ("run.json", "eval.json", "model/config.json", "model/manifest.json", "checkpoints/manifest.json")
JSON_FILES += ("model/fathom_tokenizer.json", "rollbacks.json", "best/best.json")
OTHER_FILES = (
    "metrics.csv",
    "samples.jsonl",
    "config.yaml",
    "model/tokenizer.tiktoken",
    "model/model.safetensors",
    "checkpoint",
)
VALUES = (None, True, -1, 0, 1.5, 10**9, 2**40, 10**12, 10**30, 1e308, "4", "", "x" * 5000, [], [[]], {}, {"a": 1})
VALUES += (
    "${oc.env:HOME}",
    "${run}",
    "http://127.0.0.1:1/x",
    "s3://nobody/x",
    "hf://datasets/a/b",
    "nobody/data",
    "a\0b",
)
VALUES += (
    f"{CODE}.run",
    [CODE],
    {"_target_": f"{CODE}.run", "path": "x"},
    "/dev/zero",
    "../../..",
    [{"b": [None]}],
    "é\ud800",
)
TEXTS = (b"", b"{", b"[]", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}', b"[" * 200_000, b"null")
TEXTS += (
    b'{"a":' * 300 + b"1" + b"}" * 300,
    b'\xef\xbb\xbf{"a": 1}',
    '{"ä": 1}'.encode("utf-16"),
    b"\0" * 100,
    b"7" * 5000,
)
TENSORS = (
    torch.zeros(3),
    torch.zeros(2, 3, dtype=torch.int64),
    torch.zeros(1).expand(2**40),
    torch.full((4,), torch.nan),
)
JSON_WAYS = ("value", "value", "value", "key", "more", "twice")
FILE_WAYS = (
    "text",
    "truncated",
    "bytes",
    "gone",
    "folder",
    "pipe",
    "device",
    "loop",
    "link",
    "holes",
    "swapped",
    "mode",
)


def mutate(stage: Path, draw: random.Random) -> str:
    """Change one file of a stage folder; return what was done, in words."""
    files = [stage / name for name in (*JSON_FILES, *OTHER_FILES) if name != "checkpoint" and (stage / name).is_file()]
    files += [path for _, path in list_checkpoints(stage / "checkpoints")]
    files = [path for path in files if not path.is_file() or path.stat().st_size < 1 << 26]  # larger: made of holes
    path = draw.choice(files)
    own = JSON_WAYS if path.suffix == ".json" else ("header",) * 4 if path.suffix == ".safetensors" else ()
    own = ("part",) * 6 if path.suffix == ".ckpt" else own
    how = draw.choice(own) if own and draw.random() < 0.7 else draw.choice(FILE_WAYS)
    try:
        said = WAYS[how](path, draw)
    except (ValueError, KeyError, RuntimeError) as error:  # broken by an earlier mutation already
        said = f"nothing, {type(error).__name__}"
    return f"{path.relative_to(stage)}: {how}{f' {said}' if said else ''}"


def places(thing):
    """Yield (mapping or list, key) of everything in nested mappings and lists."""
    for key, item in list(thing.items() if isinstance(thing, dict) else enumerate(thing)):
        yield thing, key
        if isinstance(item, dict | list):
            yield from places(item)


def change_json(way):
    """Return the mutation of a JSON file that `way(mapping or list, key, draw)` makes at a place of it."""

    def change(path: Path, draw: random.Random) -> str:
        content = json.loads(path.read_text())
        place, key = draw.choice(list(places(content)))
        said = way(place, key, draw)
        path.write_text(json.dumps(content))
        return f"{key} {said or ''}"[:80]

    return change


def value(place, key, draw: random.Random) -> str:
    place[key] = copy.deepcopy(draw.choice(VALUES))
    return repr(place[key])


def more(place, key, draw: random.Random) -> None:
    if isinstance(place, dict):
        place[draw.choice(("_target_", "more", "", "a.b", "${x}", "__class__"))] = draw.choice(VALUES)
    else:
        place.append(draw.choice(VALUES))


def twice(path: Path, draw: random.Random) -> None:
    text = path.read_text()
    path.write_text(text.replace("{", '{"seed": 1, "seed": 2,', 1) if draw.random() < 0.5 else text + text)


def text(path: Path, draw: random.Random) -> str:
    path.write_bytes(content := draw.choice(TEXTS))
    return repr(content[:20])


def flip(path: Path, draw: random.Random, first: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 20)):
        if content:
            content[draw.randrange(min(len(content), first or len(content)))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def header(path: Path, draw: random.Random) -> str:
    """Change the header of a safetensors file: bits of it, or shape, type, place or name of a tensor."""
    if draw.random() < 0.3:
        flip(path, draw, 400)
        return "bits"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    facts = json.loads(content[8 : 8 + size])
    name = draw.choice([name for name in facts if name != "__metadata__"])
    how = draw.choice(("dtype", "shape", "data_offsets", "gone", "named"))
    if how == "gone":
        del facts[name]
    elif how == "named":
        facts["net.more"] = facts.pop(name)
    elif how == "dtype":
        facts[name]["dtype"] = draw.choice(("F64", "I64", "BF16", "I32", "F8_E4M3", "BOOL", "X", 7))
    else:
        facts[name][how] = draw.choice(
            ([], [0, 0], [2**40, 2**40], [-1, 4], [10**30], "x", [1.5], facts[name][how][::-1])
        )
    new = json.dumps(facts).encode()
    path.write_bytes(struct.pack("<Q", draw.choice((len(new), len(new), 2**60))) + new + content[8 + size :])
    return f"{how} of {name}"


def part(path: Path, draw: random.Random) -> str:
    """Change a value of a checkpoint, and mostly write the right checksum beside it."""
    checkpoint = torch.load(path, weights_only=True)
    top = draw.choice(list(checkpoint))
    inner = (
        [(checkpoint, top), *places(checkpoint[top])]
        if isinstance(checkpoint[top], dict | list)
        else [(checkpoint, top)]
    )
    place, key = draw.choice(inner)
    if draw.random() < 0.3:
        del place[key]
    else:
        place[key] = draw.choice((*VALUES, *TENSORS))
    if draw.random() < 0.8:
        CheckpointWriter(9, False).save_checkpoint(checkpoint, path)
    else:
        torch.save(checkpoint, path)
    return f"{top} {key}"[:80]


def replaced(make):
    """Return the mutation that puts what `make(path)` makes in the place of a file."""

    def replace(path: Path, draw: random.Random) -> None:
        path.unlink()
        make(path)

    return replace


def holes(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.choice((2**30, 2**40)))


def swapped(path: Path, draw: random.Random) -> str:
    """Put the file of another stage, or another file of this one, in its place."""
    stage = next(parent for parent in path.parents if (parent / "run.json").exists() or (parent / "model").exists())
    others = [
        other for other in stage.parent.rglob("*") if other.is_file() and not other.is_symlink() and other != path
    ]
    others = [other for other in others if other.stat().st_size < 2**28]  # without those full of holes
    same = [other for other in others if other.name == path.name]
    other = draw.choice(same or others)
    shutil.copyfile(other, path)
    return f"with {other.relative_to(stage.parent)}"


WAYS = {
    "value": change_json(value),
    "key": change_json(lambda place, key, draw: place.__delitem__(key)),
    "more": change_json(more),
    "twice": twice,
    "text": text,
    "truncated": lambda path, draw: os.truncate(path, draw.randrange(max(path.stat().st_size, 1))),
    "bytes": flip,
    "gone": lambda path, draw: path.unlink(),
    "folder": replaced(Path.mkdir),
    "pipe": replaced(os.mkfifo),
    "device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "loop": replaced(lambda path: path.symlink_to(path)),
    "link": replaced(lambda path: path.symlink_to("/etc/passwd")),
    "holes": holes,
    "swapped": swapped,
    "mode": lambda path, draw: path.chmod(0),
    "header": header,
    "part": part,
}
