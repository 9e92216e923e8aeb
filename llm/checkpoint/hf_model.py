"""Causal language models of transformers, behind the interface by which Fathom's own are evaluated and served.

`HFNet` stands for a `GPT` (scores, engine), `HFTokenizer` for a `Tokenizer`, so `model=hf:<name>` is judged by the code
that judges a run. Weights are read from safetensors files only, and code in a repository is not run. A folder that
Fathom wrote is loaded by Fathom's own classes.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from llm.checkpoint.hf_tokenizer import HFTokenizer
from llm.checkpoint.model_folder import CONFIG_FILE, load_model_folder
from llm.errors import UserError
from llm.model.gpt import GPT
from llm.run.notes import content_note, say
from llm.tokenizer.bpe import Tokenizer
from llm.utils.files import read_json
from llm.utils.source import pip_install

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # fetched from a repository on the hub
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")
# Without the first, transformers asks on a terminal whether to run a model's program. The second: a file in the folder
# may name another model of the hub, such as the one that an adapter is for.
NO_CODE = {"trust_remote_code": False, "local_files_only": True}
UNREADABLE = (ValueError, OSError, ImportError, KeyError, RuntimeError)  # raised for files that hold no model
LONGEST = 2048  # tokens of context by default: a batch of a model's 128,000 would fill any memory
LOGITS = 1 << 24  # numbers in the logits held at a time


class HFShape(NamedTuple):
    """Properties of a model's config that evaluation reads."""

    seq_len: int
    vocab_size: int


class HFNet(nn.Module):
    """Causal LM of transformers with the methods of `llm.model.gpt.GPT` that scoring and generation use.

    Logits are made only on request: a hook before the head takes its input away, or replaces it. So scaling, soft caps
    and the like are done by the model's own code.
    """

    def __init__(self, model: nn.Module, seq_len: int):
        super().__init__()
        self.model = model
        self.head = model.get_output_embeddings()
        self.compute_dtype = model.dtype
        self.config = HFShape(seq_len, self.head.weight.size(0))
        self._accepts = inspect.signature(model.forward).parameters
        self.eval()  # without dropout, also if a caller restores the mode it found
        self.can_share_prefix = self._has_row_cache()  # `continue_prefixes` works

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head.weight.device

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the input (B, T, C) of the head for ids (B, T) without padding on the left."""
        return self._run_to_head(input_ids=ids, use_cache=False)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits (..., V) of outputs (..., C).

        Runs a dummy forward pass over one token and substitutes `hidden` before the head.
        """
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with self._before_head(lambda _: hidden.reshape(1, -1, hidden.size(-1))):
            logits = self.model(input_ids=one, use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], -1).float()

    def forward(
        self,
        ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        reduction: str = "none",
        cache: "HFCache | None" = None,
        lengths: torch.Tensor | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Return logits (B, T, V), or with `targets` (B, T), -1 = ignored, the cross-entropy (B, T) in nats.

        cache: continue every row behind its cached tokens. lengths (B,): true tokens per row of right-padded ids.
        last_only: logits (B, 1, V) at each row's last true token; the only form with a cache.
        """
        if targets is not None:
            if reduction != "none":
                raise ValueError(f"reduction={reduction}: models of others are not trained here, only 'none' is known")
            parts = zip(self._parts(self.hidden(ids).flatten(0, 1)), self._parts(targets.flatten()), strict=True)
            nats = [F.cross_entropy(self.logits(part), goal, ignore_index=-1, reduction="none") for part, goal in parts]
            return torch.cat(nats).view_as(targets)
        if cache is not None:
            return self._continue(ids, cache, lengths)[1]
        hidden = self.hidden(ids)
        if last_only:
            last = hidden.size(1) - 1 if lengths is None else lengths - 1
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), last].unsqueeze(1)
        return self.logits(hidden)

    def new_cache(self, batch: int, max_len: int) -> "HFCache":
        """Return an empty cache; the model's own code decides what it holds, and it grows with the tokens.

        Raises UserError for a model without a key-value cache.
        """
        if not self.can_share_prefix:
            raise UserError(
                f"model=hf: {type(self.model).__name__} has no key-value cache in all its layers, so it cannot "
                "generate here; measure what only scores, such as eval=[core]"
            )
        return HFCache(batch, self.device)

    def continue_prefixes(
        self, prefixes: torch.Tensor, lengths: torch.Tensor, n: int, rest: torch.Tensor
    ) -> torch.Tensor:
        """Compute each prefix once and `n` continuations behind it; return their outputs (B n, 1 + T, C).

        prefixes: (B, S), of which the first `lengths` (B,) tokens count; rest: (B n, T), the continuations. The outputs
        are those at the last token of the prefix and at every token of the continuation.
        """
        cache = self.new_cache(*prefixes.shape)
        hidden = self._continue(prefixes, cache, lengths)[0][:, -1:].repeat_interleave(n, dim=0)
        cache.repeat(n)
        return torch.cat((hidden, self._continue(rest, cache)[0]), dim=1) if rest.size(1) else hidden

    @torch.no_grad()
    def _has_row_cache(self) -> bool:
        """Return True if rows of the model's cache can be copied and left out, unlike states of linear attention."""
        if "past_key_values" not in self._accepts:
            return False
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        layers = getattr(self.model(input_ids=one, use_cache=True).past_key_values, "layers", [])
        needed = ("batch_repeat_interleave", "batch_select_indices")
        return bool(layers) and all(
            all(hasattr(layer, name) for name in needed) and not hasattr(layer, "conv_states") for layer in layers
        )

    def _parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split rows so that the logits of a part stay within LOGITS numbers."""
        return rows.split(max(1, LOGITS // self.config.vocab_size))

    def _continue(
        self, ids: torch.Tensor, cache: "HFCache", lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return outputs (B, T, C) for tokens behind those of the cache, and the fp32 logits (B, 1, V) of the last.

        The first ids are padded on the right and are moved to the right end, where `transformers` expects them: so the
        tokens of a row lie side by side in the cache, and windows reach as far as they should.
        """
        positions = cache.lengths.unsqueeze(1) + torch.arange(ids.size(1), device=ids.device)
        mask = torch.ones_like(ids)
        if lengths is not None:
            positions = positions - (ids.size(1) - lengths).unsqueeze(1)
            mask = (positions >= 0).long()
            positions = positions.clamp(min=0)
            ids = ids.gather(1, positions)
        positions = positions.clamp(max=self.config.seq_len - 1)  # padding behind short continuations may lie beyond
        cache.mask = torch.cat((cache.mask, mask), dim=1)
        more = {"position_ids": positions} if "position_ids" in self._accepts else {}
        hidden, output = self._run_to_head(
            input_ids=ids, attention_mask=cache.mask, past_key_values=cache.states, use_cache=True, **more
        )
        cache.states = output.past_key_values
        cache.lengths = cache.lengths + (ids.size(1) if lengths is None else lengths)
        return hidden, output.logits.float()

    def _run_to_head(self, **inputs: Any) -> tuple[torch.Tensor, Any]:
        """Run the model with logits of the last position only; return the head's input (B, T, C) and the output."""
        seen: list[torch.Tensor] = []

        def take(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden)
            return hidden[:, -1:]

        with self._before_head(take):
            output = self.model(**inputs)
        return seen[0], output

    @contextmanager
    def _before_head(self, replace: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Replace the input of the head while the block runs."""
        hook = self.head.register_forward_pre_hook(lambda _, inputs: (replace(inputs[0]), *inputs[1:]))
        try:
            yield
        finally:
            hook.remove()


class HFCache:
    """Keys and values of B rows in the model's own form, and a mask (B, S) of the positions that hold tokens."""

    def __init__(self, batch: int, device: torch.device):
        self.states: Any = None
        self.mask = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # true tokens per row
        self.used = 0  # for `llm.inference.static_batch`; this cache grows by itself

    def repeat(self, n: int) -> None:
        """Repeat every row n times, copies side by side."""
        self.states.batch_repeat_interleave(n)
        self.mask, self.lengths = self.mask.repeat_interleave(n, dim=0), self.lengths.repeat_interleave(n)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows and drop all others."""
        self.states.batch_select_indices(rows)
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_hf(
    name: str, seq_len: int | None, device: str | torch.device, verify: bool = True
) -> tuple[HFNet, HFTokenizer] | tuple[GPT, Tokenizer]:
    """Load model and tokenizer from a folder or the hub, with the weights in the number format of their files.

    Our own classes load a model that Fathom wrote; verify: compare its files with their checksums. seq_len: tokens of
    context to use at most; None = the model's own, up to `LONGEST` for models of others. Raises UserError if the model
    cannot be had or is no causal language model.
    """
    folder = hf_folder(name)
    if _is_ours(folder):
        return _load_ours(name, folder, seq_len, device, verify)
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"model=hf:{name} needs transformers: {pip_install('hf')}") from error
    transformers.utils.logging.disable_progress_bar()
    config, tokenizer, model = _read(name, folder)
    own = _context(config, tokenizer)
    _check_context(name, seq_len, own)
    net = HFNet(model.to(device), seq_len or min(own or LONGEST, LONGEST))
    if not _is_causal(net):
        raise UserError(
            f"model=hf:{name}: a token changes what is predicted before it, so this {type(model).__name__} is no "
            "causal language model; name one such as hf:openai-community/gpt2"
        )
    return net, HFTokenizer(tokenizer, net.config.vocab_size, _stops(model.generation_config))


def load_hf_tokenizer(name: str) -> HFTokenizer | Tokenizer:
    """Load the tokenizer of a model folder or of the hub, without the weights beside it. Raises UserError for none."""
    folder = hf_folder(name)
    if _is_ours(folder):
        return Tokenizer.load(folder)
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
        try:
            settings = transformers.GenerationConfig.from_pretrained(folder)
        except OSError:  # there are none: transformers takes them from the model's config
            settings = transformers.GenerationConfig.from_model_config(config)
    except UNREADABLE as error:
        raise UserError(f"model=hf:{name}: {_why_not(error)}") from error
    return HFTokenizer(tokenizer, config.get_text_config().vocab_size, _stops(settings))


def _stops(settings: Any) -> list[int | None]:
    """Return the ids that end a completion by a model's generation settings; None for one that they do not have."""
    stops = getattr(settings, "eos_token_id", None)
    return stops if isinstance(stops, list) else [stops]


def _is_ours(folder: Path) -> bool:
    """Return True if Fathom wrote the model in `folder`: config.json has a section `fathom`."""
    try:
        return isinstance((read_json(folder / CONFIG_FILE) or {}).get("fathom"), dict)
    except UserError:  # those of others may hold what standard JSON does not
        return False


def _load_ours(
    name: str, folder: Path, seq_len: int | None, device: str | torch.device, verify: bool
) -> tuple[GPT, Tokenizer]:
    """Load a model that Fathom wrote. Raises UserError for damaged files and a context that the model cannot have."""
    net, tokenizer = load_model_folder(folder, device, verify)
    say(content_note(folder))
    own = net.config
    _check_context(name, seq_len, own.seq_len)
    net.config = replace(own, seq_len=seq_len or own.seq_len)
    follows = [config.window(layer) for config in (own, net.config) for layer in range(own.n_layer)]
    is_other = follows[: own.n_layer] != follows[own.n_layer :] or own.rope_scaling or own.arch == "gpt2"
    if net.config != own and is_other:
        raise UserError(
            f"eval.seq_len={seq_len}: the windows or positions of hf:{name} belong to its context of {own.seq_len} "
            "tokens; leave eval.seq_len=null"
        )
    return net.eval(), tokenizer


def _check_context(name: str, seq_len: int | None, own: int | None) -> None:
    """Raise UserError where eval.seq_len asks for a longer context than the model's own (None: without limit)."""
    if seq_len is not None and own is not None and seq_len > own:
        raise UserError(f"eval.seq_len={seq_len}: hf:{name} has a context of {own} tokens")


def _read(name: str, folder: Path) -> tuple[Any, Any, nn.Module]:
    """Return config, tokenizer and model of a folder. Raises UserError unless its files hold a whole language model."""
    import transformers
    from safetensors import SafetensorError

    try:
        config = transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype="auto", use_safetensors=True, output_loading_info=True, **NO_CODE
        )
    except (*UNREADABLE, SafetensorError) as error:
        raise UserError(f"model=hf:{name}: {_why_not(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model=hf:{name}: its files lack {missing[0]} ({len(missing)} in all), which a causal language model needs"
        )
    if model.get_output_embeddings() is None:
        raise UserError(f"model=hf:{name}: this {type(model).__name__} has no head over a vocabulary to score with")
    return config, tokenizer, model


def hf_folder(name: str, key: str = "model") -> Path:
    """Return the folder itself, or the one into which the hub's files have been fetched.

    Raises UserError that begins with `key`, the configuration key.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{key}=hf:{name}: the folder has no config.json; give the one that holds the weights")
        return path
    if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"{key}=hf:{name}: no such folder; on the hub a model is called <owner>/<name>")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES, ignore_patterns=["*/*"]))
    except errors.HFValidationError as error:
        raise UserError(f"{key}=hf:{name}: write hf:<owner>/<name> as in the model's address on the hub") from error
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        status = getattr(error.response, "status_code", "?")
        raise UserError(
            f"{key}=hf:{name}: the hub refuses it ({status}): there is no such model, or it is private or gated. "
            "Correct the name, or accept its terms on its page and set HF_TOKEN"
        ) from error
    except Exception as error:  # those of httpx and JSON too: a broken connection, a page to sign in to a network
        raise UserError(
            f"{key}=hf:{name}: the hub cannot be reached or fails ({first_line(error.__cause__ or error)}). Check the "
            "network or HF_ENDPOINT, take one that was fetched before by HF_HUB_OFFLINE=1, or give a folder: "
            f"{key}=hf:/path/to/folder"
        ) from error
    if not (found / "config.json").is_file():
        raise UserError(f"{key}=hf:{name}: the repository has no config.json, so it holds no model of transformers")
    return found


def _why_not(error: Exception) -> str:
    """Return advice on an error of transformers."""
    text = str(error)
    if "trust_remote_code" in text:
        return "it brings code of its own, which is not run here; take a model that transformers knows"
    if "Unrecognized configuration class" in text:
        return "no causal language model; name one such as hf:openai-community/gpt2"
    if "ignore_mismatched_sizes" in text:
        return "the weights in its files have other shapes than its config.json says"
    return f"transformers cannot load it ({first_line(error)})"


def first_line(error: BaseException) -> str:
    """Return the text of an error on one line of at most 240 characters."""
    return " ".join(str(error).split())[:240] or type(error).__name__


def _context(config: Any, tokenizer: Any) -> int | None:
    """Return the tokens of the model's context; None if nothing limits it."""
    text = config.get_text_config()
    known = [getattr(text, key, None) for key in CONTEXT_KEYS]
    limit = next((value for value in known if isinstance(value, int) and value > 0), tokenizer.model_max_length)
    return None if limit is None or limit > 1 << 30 or math.isinf(limit) else int(limit)


@torch.no_grad()
def _is_causal(net: HFNet) -> bool:
    """Return True if another last token leaves the outputs before it unchanged."""
    ids = torch.arange(1, 9, device=net.device).unsqueeze(0) % net.config.vocab_size
    other = ids.clone()
    other[0, -1] = 0
    before, after = (net.hidden(one)[:, :-1].float() for one in (ids, other))
    return torch.allclose(before, after, rtol=1e-2, atol=1e-2 * float(before.abs().max()))
