"""Samples to look at: prompts from held-out data and a model's completions of them."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import regex

from llm.config.check import shown
from llm.errors import UserError
from llm.inference.sampling import SamplingParams
from llm.tokenizer.bpe import without_surrogates
from llm.tokenizer.chat_format import render_prompt
from llm.utils.words import has_spaces

NO_PROMPTS = "samples: none, the held-out data gives no prompt"
SIGNS = 20  # letters of a prompt in a script without spaces
HEAD = 1_000  # characters that tell whether a document has spaces
_ENDS = ".!?。！？｡．।॥؟۔…"  # of sentences
_WORD, _SIGN, _END = regex.compile(r"\S+"), regex.compile(rf"\s*\X[{_ENDS}]*"), regex.compile(rf"[{_ENDS}]$")


def questions(mixture, n: int = 4) -> list[dict]:
    """Return the first turns of the first n held-out conversations, to be answered as samples."""
    firsts = []
    for i in range(min(n, len(mixture))):
        messages = mixture[i]["messages"]
        end = next((k for k, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
        firsts.append({"messages": messages[:end]})
    return firsts


def text_prompts(documents: Iterable[str], n: int = 4, n_words: int = 6) -> list[str]:
    """Return the first words of n held-out documents, prompts that suit the language and subject of a run.

    Of text without spaces it is the first `SIGNS` letters. They are cut before the end of a sentence, where a model
    could rightly stop. Half a surrogate pair is U+FFFD.
    """
    prompts = []
    for document in documents:
        text = without_surrogates(document.lstrip())
        head = text[:HEAD]
        part, wanted = (_WORD, n_words) if has_spaces(head.split(), head) else (_SIGN, SIGNS)
        parts = list(islice(part.finditer(text), wanted + 1))
        if len(parts) <= wanted:
            continue
        del parts[wanted:]
        while parts and _END.search(parts[-1][0]):
            parts.pop()
        if parts:
            prompts.append(text[: parts[-1].end()])
        if len(prompts) == n:
            break
    return prompts


def given_prompts(texts: Sequence[str], tokenizer: Any, seq_len: int, is_chat: bool) -> list[str | dict]:
    """Return `stage.prompts` as prompts of samples: texts to continue, or, of a chat model, questions of a user.

    seq_len: context of the model in tokens. Raises UserError where there are none, and for one that fills the context.
    """
    if not texts:
        raise UserError("stage.prompts=[]: holds no prompt; name some, or set stage.sample_every=0 for no samples")
    prompts = [{"messages": [{"role": "user", "content": text}]} if is_chat else text for text in texts]
    for place, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        if not text.strip():
            raise UserError(f"stage.prompts.{place}={text!r}: is blank; give a text")
        if (length := len(_ids(tokenizer, prompt))) >= seq_len:
            raise UserError(
                f"stage.prompts.{place}={shown(text)}: has {length:,} tokens and leaves no room in the context, "
                f"model.seq_len={seq_len:,}; shorten it"
            )
    return prompts


def draw_samples(engine: Any, prompts: Sequence[str | dict], max_new_tokens: int = 64) -> list[dict[str, str]]:
    """Return greedy completions as [{"prompt", "completion"}]: a string is continued, a conversation is answered.

    Prompts that fill the model's context are left out.
    """
    tokenizer = engine.tokenizer
    ids = [_ids(tokenizer, prompt) for prompt in prompts]
    room = [i for i, one in enumerate(ids) if len(one) < engine.net.config.seq_len]
    texts = _complete(engine, [ids[i] for i in room], max_new_tokens) if room else []
    shown = [prompts[i] if isinstance(prompts[i], str) else last_question(prompts[i]) for i in room]
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(shown, texts, strict=True)]


def _ids(tokenizer: Any, prompt: str | dict) -> list[int]:
    """Return the tokens of a text to continue, or of a conversation to answer."""
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    return render_prompt(tokenizer, prompt)


def last_question(conversation: dict) -> str:
    """Return the text of the last user turn, which a sample of a chat model answers."""
    return next(m["content"] for m in reversed(conversation["messages"]) if m["role"] == "user")


def _complete(engine: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Return the greedy completion of each prompt as text."""
    params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    return [engine.tokenizer.decode(samples[0].ids) for samples in engine.generate(prompts, params)]
