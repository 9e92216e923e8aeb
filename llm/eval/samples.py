"""Samples to look at: prompts from held-out data and a model's completions of them."""

from collections.abc import Iterable, Sequence
from typing import Any

from llm.inference.sampling import SamplingParams
from llm.tokenizer.chat_format import render_prompt


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

    They are cut before the end of a sentence, where a model could rightly stop.
    """
    prompts = []
    for document in documents:
        words = document.split()[: n_words + 1]
        if len(words) <= n_words:
            continue
        del words[n_words:]
        while words and words[-1].endswith((".", "!", "?", "。")):
            words.pop()
        if words:
            prompts.append(" ".join(words))
        if len(prompts) == n:
            break
    return prompts


def draw_samples(engine: Any, prompts: Sequence[str | dict], max_new_tokens: int = 64) -> list[dict[str, str]]:
    """Return greedy completions as [{"prompt", "completion"}]: a string is continued, a conversation is answered.

    Prompts that fill the model's context are left out.
    """
    tokenizer = engine.tokenizer
    ids = [
        [tokenizer.bos_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else render_prompt(tokenizer, prompt)
        for prompt in prompts
    ]
    room = [i for i, one in enumerate(ids) if len(one) < engine.net.config.seq_len]
    texts = _complete(engine, [ids[i] for i in room], max_new_tokens) if room else []
    shown = [prompts[i] if isinstance(prompts[i], str) else last_question(prompts[i]) for i in room]
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(shown, texts, strict=True)]


def last_question(conversation: dict) -> str:
    """Return the text of the last user turn, which a sample of a chat model answers."""
    return next(m["content"] for m in reversed(conversation["messages"]) if m["role"] == "user")


def _complete(engine: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Return the greedy completion of each prompt as text."""
    params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    return [engine.tokenizer.decode(samples[0].ids) for samples in engine.generate(prompts, params)]
