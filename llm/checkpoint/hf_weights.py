"""Read checkpoints of Qwen3 or Llama in the form of transformers: `init_from=hf:<folder or owner/name>`.

Weights come from safetensors files, and nothing in the folder is run. A tensor that is unknown or missing is refused.
The tokenizer must be byte-level BPE: its tokens keep their rows of the tables, and our special tokens come behind them.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llm.checkpoint.hf_model import hf_folder
from llm.checkpoint.model_folder import CONFIG_FILE, FLOATS, WEIGHTS_FILE, save_model_folder
from llm.checkpoint.names import VOCAB_PARAMS, file_name
from llm.errors import UserError, reason_of
from llm.model.gpt import GPT, build_network
from llm.model.qwen3_config import Qwen3Config
from llm.run.formats import SHAPE
from llm.run.lock import IMPORT_SECONDS, waiting_lock
from llm.tokenizer.bpe import META_FILE, SPECIAL_TOKENS, Tokenizer
from llm.tokenizer.hf_files import byte_alphabet
from llm.tokenizer.pretrained import load_pretrained
from llm.utils.files import check_ordinary, read_json

PREFIX = "hf:"
INDEX_FILE = WEIGHTS_FILE + ".index.json"
TYPES = {"qwen3": True, "llama": False}  # model_type: whether queries and keys are normed
# What else config.json must say, if it says it: other values are of models that these blocks do not compute.
NEEDED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "pretraining_tp": (1,),
    "quantization_config": (),
}


def imported_folder(init_from: str, runs: str | Path) -> Path:
    """Return a model/ folder with what `init_from`=hf:<name> names, written below `runs` where it is missing.

    Raises UserError where a file is missing or damaged, and for a model or tokenizer of another kind.
    """
    source = hf_folder(init_from.removeprefix(PREFIX), "init_from")
    files = sorted(path for path in source.iterdir() if path.suffix in (".json", ".safetensors"))
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    folder = Path(runs) / ".hf" / hashlib.sha256(repr(stats).encode()).hexdigest()[:16] / "model"
    if not (folder / CONFIG_FILE).is_file():
        with waiting_lock(folder.parent.with_suffix(".lock"), IMPORT_SECONDS):  # another job may start from it too
            if not (folder / CONFIG_FILE).is_file():
                net, tokenizer, note = read_hf(source)
                save_model_folder(folder, net, tokenizer)
                print(f"{source} was written as {folder}{note}; train it with small rates (docs/runs.md)", flush=True)
    return folder


def read_hf(folder: Path) -> tuple[GPT, Tokenizer, str]:
    """Return network (fp32) and tokenizer of a folder, and in words what of its tables was left out or is new."""
    path = folder / CONFIG_FILE
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: there is no such file, so the folder holds no model of transformers")
    tokenizer, rows = read_tokenizer(folder, content)
    tensors = open_tensors(folder)
    net = build_network(shape(content, tokenizer.vocab_size, path))
    n_rows = copy_tensors(net, tensors, rows, folder)
    new, left = sum(row is None for row in rows), n_rows - len({row for row in rows if row is not None})
    parts = [f"{left} rows of its tables belong to tokens that are not kept"] if left else []
    parts += [f"{new} special tokens begin as the mean of all rows"] if new else []
    return net, tokenizer, "".join(f"; {part}" for part in parts)


def shape(content: dict, vocab_size: int, path: Path) -> Qwen3Config:
    """Return the shape that config.json describes. Raises UserError for blocks that are not Qwen3's or Llama's."""
    kind = content.get("model_type")
    if kind not in TYPES:
        raise UserError(
            f"{path}: model_type {str(kind)[:40]}: only models of the types {', '.join(TYPES)} can be trained on"
        )
    for key, allowed in NEEDED.items():
        if content.get(key) is not None and content[key] not in allowed:
            raise UserError(f"{path}: {key}={str(content[key])[:60]}: such a {kind} model cannot be trained on here")
    key = "rope_scaling" if content.get("rope_scaling") else "rope_parameters"  # the first wins, as in transformers
    rope = content.get(key) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: {key}={str(rope)[:60]} is no object with a rope_type; restore the file")
    rope_kind = rope.get("rope_type", rope.get("type", "default"))
    if rope_kind != "default":
        raise UserError(f"{path}: rotary positions of type {str(rope_kind)[:40]}; only plain ones are known")
    try:
        width, heads = content["hidden_size"], content["num_attention_heads"]
        found = Qwen3Config(
            n_layer=content["num_hidden_layers"],
            n_head=heads,
            n_kv_head=content.get("num_key_value_heads") or heads,
            head_dim=content.get("head_dim") or width // heads,
            n_embd=width,
            seq_len=content["max_position_embeddings"],
            vocab_size=vocab_size,
            rope_base=float(rope.get("rope_theta") or content.get("rope_theta") or 10_000.0),
            tied=bool(content.get("tie_word_embeddings", False)),
            mlp_width=content["intermediate_size"],
            qk_norm=TYPES[kind],
            norm_eps=float(content.get("rms_norm_eps", 1e-6)),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: is not a shape that can be ({type(error).__name__}: {error})") from error
    SHAPE({name: value for name, value in found.to_dict().items() if not isinstance(value, tuple)}, str(path))
    return found


def read_tokenizer(folder: Path, content: dict) -> tuple[Tokenizer, list[int | None]]:
    """Return the tokenizer, and for each of its ids the row of that token in the folder's tables; None = it has none.

    <|bos|> takes the row of the token that config.json names so, or of that which ends a text.
    """
    if (folder / META_FILE).is_file():
        tokenizer = Tokenizer.load(folder)
        return tokenizer, list(range(tokenizer.vocab_size))
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"init_from=hf:{folder}: there is no tokenizer.json, so its tokens are not known")
    tokenizer = load_pretrained(str(path), "init_from")
    found, alphabet = read_json(path), byte_alphabet()
    ids = found["model"]["vocab"]
    special = {token["content"]: token["id"] for token in found.get("added_tokens", [])}
    rows: list[int | None] = [ids["".join(alphabet[b] for b in token)] for token in tokenizer.tokens]
    ends = (content.get("bos_token_id"), content.get("eos_token_id"))
    starts = [end[0] if isinstance(end, list) and end else end for end in ends]
    size = content.get("vocab_size")
    in_table = range(size if isinstance(size, int) else 1 << 31)
    bos = next((start for start in starts if type(start) is int and start in in_table), None)  # -1 stands for none
    return tokenizer, rows + [special.get(name, bos if name == "<|bos|>" else None) for name in SPECIAL_TOKENS]


def open_tensors(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor by name, of one file or of several that an index lists."""
    index = read_json(folder / INDEX_FILE)
    try:
        if index is not None:
            files = sorted(set(index["weight_map"].values()))
            if any(Path(name).name != name for name in files):
                raise UserError(f"{folder / INDEX_FILE}: names a file outside of the folder")
        else:
            files = [WEIGHTS_FILE]
        found = {}
        for name in files:
            check_ordinary(folder / name)
            with safe_open(folder / name, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), folder / name)
        return found
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"init_from=hf:{folder}: its weights cannot be read ({reason_of(error, folder)[:160]}); only "
            f"{WEIGHTS_FILE}, or parts that {INDEX_FILE} lists, are read"
        ) from error


def copy_tensors(net: GPT, tensors: dict[str, Path], rows: list[int | None], folder: Path) -> int:
    """Copy all tensors into `net`, rows of tables as `rows` says; return how many rows the tables had.

    Raises UserError for a missing or unknown tensor, or one of another shape. A copy of a tied head is no unknown one.
    """
    where, state, n_rows = f"init_from=hf:{folder}", net.state_dict(), 0
    names = {file_name(name, net.config): name for name in state}
    unknown = {name for name in tensors if not name.endswith(".rotary_emb.inv_freq")} - set(names)
    if net.config.tied and "lm_head.weight" in unknown:
        head, table = (_tensor(tensors, name, where) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if not torch.equal(head, table):
            raise UserError(f"{where}: config.json says that head and embedding are tied, but they differ")
        unknown.remove("lm_head.weight")
    for words, wrong in (("is missing", set(names) - set(tensors)), ("is unknown", unknown)):
        if wrong:
            raise UserError(f"{where}: tensor {min(wrong)} {words} ({len(wrong)} in all); nothing was taken")
    for theirs, name in names.items():
        found, target = _tensor(tensors, theirs, where), state[name]
        is_table = name.startswith(VOCAB_PARAMS)
        least = 1 + max(row for row in rows if row is not None) if is_table else len(target)
        fits = found.shape[1:] == target.shape[1:] and (len(found) >= least if is_table else len(found) == least)
        if not fits:
            raise UserError(f"{where}: tensor {theirs} has shape {tuple(found.shape)}, not {tuple(target.shape)}")
        if not is_table:
            target.copy_(found)
            continue
        n_rows, mean = len(found), found.float().mean(dim=0)
        target.zero_()
        target[: len(rows)] = found[[0 if row is None else row for row in rows]].float()
        target[[i for i, row in enumerate(rows) if row is None]] = mean
    return n_rows


def _tensor(tensors: dict[str, Path], name: str, where: str) -> torch.Tensor:
    """Return one tensor of finite floats. Raises UserError for other numbers, as quantised weights have them."""
    try:
        with safe_open(tensors[name], framework="pt") as file:
            kind = file.get_slice(name).get_dtype()
            if kind not in FLOATS:
                raise UserError(f"{where}: tensor {name} holds {kind}; only {', '.join(FLOATS)} can be trained on")
            found = file.get_tensor(name)
            if not found.float().isfinite().all():
                raise UserError(f"{where}: tensor {name} has values that are not finite; fetch the model again")
            return found
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{where}: tensor {name} cannot be read ({error})") from error
