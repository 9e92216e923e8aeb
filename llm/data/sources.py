"""Build the source of text that a data configuration names."""

from collections.abc import Mapping, Sequence

from llm.config.check import shown, structured
from llm.config.data_schema import SourceSpec
from llm.config.registries import TEXT_SOURCES
from llm.config.targets import TARGET, arguments_of, check_arguments, load_target, takes
from llm.data.documents import DocumentSource, FileDocuments, LocalDocuments, gives_ids
from llm.data.embedded_documents import EmbeddedDocuments
from llm.data.stores import is_address
from llm.errors import UserError

# Keys of the group `data` that say where text is, and the sources that read them; null where they are not given.
READERS = {
    **dict.fromkeys(("path", "train", "val"), ("local", "tokens")),
    **dict.fromkeys(("repo", "revision", "files", "shards"), ("hub",)),
    "sources": ("mixture",),
    "source": ("custom",),
    **dict.fromkeys(("encoding", "separator"), ("local", "hub")),
    "shuffle": ("local", "hub", "mixture", "tokens"),
    "near_duplicates": ("local", "hub", "mixture"),
    "end_of_text": ("tokens",),
}


def document_source(data, cache: str, tokenizer=None) -> DocumentSource:
    """Build the source of text of the config group `data` and check it as far as that is cheap; cache: paths.data.

    tokenizer: of the model that reads it. Raises UserError where the source needs one and there is none.
    """
    source = read_with(build_source(data, cache), tokenizer)
    print(f"text: {source.check()}", flush=True)
    return source


def read_with(source: DocumentSource, tokenizer) -> DocumentSource:
    """Return `source`; one of token ids is read with `tokenizer`. Raises UserError where it needs one and gets none."""
    if gives_ids(source):
        if tokenizer is None:
            raise UserError(
                "data=tokens holds token ids and no text, so it needs a run's tokenizer: init_from=<run>/tokenizer. To "
                "train one or to write tokens, name the text; data=embedded stage.pretrained=... takes one over"
            )
        source.use(tokenizer)
    return source


def build_source(data, cache: str) -> DocumentSource:
    """Build the source of text that `data.name` names, without a check of its text.

    Nothing is fetched but the list of a hub data set's files. Raises UserError for a name that does not exist.
    """
    if data.get("streaming") and data.name != "hub":
        raise UserError(f"data.streaming=true is for data sets of the hub, not for data={data.name}; leave it out")
    build = TEXT_SOURCES.get(data.name, "data.name")
    for name, sources in READERS.items():
        if data.get(name) is not None and data.name not in sources:
            raise UserError(
                f"data.{name}={data[name]} is not read by this option of data; leave it out or choose "
                f"data={' or data='.join(sources)}"
            )
    for name in ("train", "val"):
        check_entries(data.get(name), f"data.{name}")
    source = build(data, cache)
    if data.get("near_duplicates") is not None:
        from llm.data.near_duplicates import leave_out

        leave_out(source, data.near_duplicates, cache)
    return source


def check_entries(value, key: str) -> None:
    """Raise UserError where a key that names text is neither null, a text nor a list of texts."""
    entries = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if value is not None and not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{key}={str(value)[:80]}: must be a text, or a list of texts")


def is_remote(data) -> bool:
    """Return whether the text of the config group `data` lies on the network: a dry run then does not look at it."""
    entries = [data.get(name) for name in ("path", "train", "val")] if data.name in ("local", "tokens") else []
    if any(is_address(entry) for part in entries for entry in ([part] if isinstance(part, str) else part or [])):
        return True
    if data.name == "custom":
        return bool(getattr(load_target(data.source, "data.source"), "is_remote", False))
    return TEXT_SOURCES.get(data.name, "data.name").is_remote


def embedded_source(data, cache: str) -> DocumentSource:
    """Build data=embedded: the generated world."""
    return EmbeddedDocuments(data.size, data.seed, data.val_size)


def local_source(data, cache: str) -> DocumentSource:
    """Build data=local: the user's own files."""
    return _files_source(data, cache, data.workers, "data", "path", data.get("shuffle"))


def tokens_source(data, cache: str) -> DocumentSource:
    """Build data=tokens: ids that stage=write_tokens wrote, or token files of other programs."""
    from llm.data.token_documents import token_source

    return token_source(data.path, data.train, data.val, data.end_of_text, data.get("shuffle"))


def hub_source(data, cache: str) -> DocumentSource:
    """Build data=hub: shards of a data set on the hub, stored in `cache` or streamed."""
    return _files_source(data, cache, data.workers, "data", "repo", data.get("shuffle"))


def mixture_source(data, cache: str) -> DocumentSource:
    """Build data=mixture: several sources of files, each with its weight. Raises UserError for wrong `data.sources`."""
    from llm.data.text_mixture import MixedDocuments

    if not isinstance(data.sources or {}, Mapping):
        raise UserError(f"data.sources={data.sources}: write {{<name>: {{path: ...}}, <name>: {{repo: ...}}}}")
    specs = {
        name: structured(values, SourceSpec, f"data.sources.{name}") for name, values in (data.sources or {}).items()
    }
    for spec in specs.values():
        spec.bad_rows = spec.bad_rows or data.get("bad_rows")
    sources = {name: spec for name, spec in specs.items() if spec.weight > 0}
    if not sources:
        raise UserError("data.sources: no source has a weight above 0; data=mixture needs at least one (docs/data.md)")
    built = {}
    for name, source in sources.items():
        key = f"data.sources.{name}"
        for part in ("train", "val"):
            check_entries(source.get(part), f"{key}.{part}")
        if (source.path is None and source.train is None) == (source.repo is None):
            raise UserError(f"{key}: set either path (files; train and val name some) or repo (a data set on the hub)")
        kind = "path" if source.repo is None else "repo"
        for other in ("revision", "files", "shards") if kind == "path" else ("val",):
            if source.get(other) is not None:
                raise UserError(f"{key}.{other}={shown(source[other])} is not read with {key}.{kind}; leave it out")
        built[name] = _files_source(source, cache, data.workers, key, kind, data.get("shuffle")), source.weight
    return MixedDocuments(built)


def custom_source(data, cache: str) -> DocumentSource:
    """Build data=custom: the class that `data.source` names, with its arguments, and with `cache` if it takes that.

    Raises UserError for what does not exist, for wrong arguments, and for a class without `check` or `iterate`.
    """
    key = "data.source"
    build = load_target(data.source, key)
    check_arguments(build, data.source, key)
    more = {"cache": cache} if "cache" not in data.source and takes(build, "cache") else {}
    source = build(**arguments_of(data.source), **more)
    if missing := [name for name in ("check", "iterate") if not callable(getattr(source, name, None))]:
        raise UserError(f"{key}._target_={data.source[TARGET]}: it has no {' and no '.join(missing)} (docs/extend.md)")
    return source


def _files_source(spec, cache: str, workers: int, key: str, kind: str, seed: int | None) -> FileDocuments:
    """Build documents of files, in an order by `seed` unless it is None; see `_in_file_order`."""
    documents = _in_file_order(spec, cache, workers, key, kind)
    if seed is not None:
        from llm.data.shuffle import Shuffle, fits

        documents.shuffle = Shuffle(seed, whole=kind == "path" and fits(documents.files))
    return documents


def _in_file_order(spec, cache: str, workers: int, key: str, kind: str) -> FileDocuments:
    """Build documents of files: of this machine (kind "path") or of the hub ("repo"). key: where `spec` stands."""
    if spec[kind] is None and not (kind == "path" and spec.get("train")):
        needs = {
            "path": "data=local needs data.path=<folder, file or pattern of your text>",
            "repo": "data=hub needs data.repo=<owner>/<name> of a data set on the hub",
        }
        raise UserError(f"{key}.{kind} is not set: {needs[kind]}")
    if kind == "path" and spec.get("streaming"):
        raise UserError(f"{key}.streaming=true is for data sets of the hub, not for {key}.path; leave it out")
    if kind == "path":
        return LocalDocuments(
            spec.path, spec.column, spec.val_size, key, train=spec.get("train"), val=spec.get("val"), **_reading(spec)
        )
    from llm.data.download import HubFolder
    from llm.data.hub_documents import HubDocuments
    from llm.data.streaming import StreamedDocuments

    documents = StreamedDocuments if spec.get("streaming") else HubDocuments
    folder = HubFolder(spec.repo, spec.revision or "main", cache, workers, key)
    return documents(folder, spec.files, spec.shards, spec.column, spec.val_size, key, **_reading(spec))


def _reading(spec) -> dict:
    """Return how rows are read; old configurations lack these keys."""
    return {
        "bad_rows": spec.get("bad_rows") or "stop",
        "encoding": spec.get("encoding"),
        "separator": spec.get("separator"),
    }
