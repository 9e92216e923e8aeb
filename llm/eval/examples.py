"""Questions to begin a chat with: held-out ones that a model has just answered right, every time it was asked.

They are chosen where a chat stage hands its model over, and lie in `model/` (`llm.checkpoint.examples`). So they are
in the language of the data, and somebody who clicks on one sees what the model can do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llm.eval.task_scores import spread
from llm.inference.sampling import SamplingParams
from llm.tokenizer.chat_format import render_prompt

MOST = 4
LONGEST = 200  # characters: a button holds no more
CANDIDATES = 6  # questions of a task
TIMES = 6  # each of them is asked
CHAT = SamplingParams(temperature=0.6, top_k=50, max_new_tokens=256)  # as conf/serve.yaml has it


def choose_examples(engine: Any, tasks: Mapping[str, Any], others: Sequence[dict] = ()) -> list[str]:
    """Return at most `MOST` questions, one of each task in turn, that the model answered right all `TIMES`.

    others: conversations that end with a question, of tasks that judge no answer. They are taken where the tasks give
    fewer than two, if all answers ended by themselves.
    """
    found = [_answered(engine, task, [task[i] for i in spread(len(task), CANDIDATES)]) for task in tasks.values()]
    rounds = max((len(questions) for questions in found), default=0)
    chosen = [questions[i] for i in range(rounds) for questions in found if i < len(questions)]
    if len(chosen) < 2:
        chosen += _answered(engine, None, others)
    return list(dict.fromkeys(chosen))[:MOST]


def _answered(engine: Any, task: Any, conversations: Sequence[dict]) -> list[str]:
    """Return the questions among short ones without a past whose answers are all right; task None: all have an end."""
    asked = []
    for conversation in conversations:
        messages = conversation["messages"]
        turns = messages if messages[-1]["role"] == "user" else messages[:-1]
        prompt = render_prompt(engine.tokenizer, conversation)
        fits = len(prompt) + CHAT.max_new_tokens // 4 <= engine.net.config.seq_len
        if len(turns) == 1 and len(turns[0]["content"]) <= LONGEST and fits:
            asked.append((turns[0]["content"], conversation, prompt))
    if not asked:
        return []
    answers = engine.generate([prompt for _, _, prompt in asked], CHAT, TIMES)
    return [
        question
        for (question, conversation, _), samples in zip(asked, answers, strict=True)
        if _all_right(engine.tokenizer, task, conversation, samples)
    ]


def _all_right(tokenizer: Any, task: Any, conversation: dict, samples: Sequence[Any]) -> bool:
    if any(sample.finish_reason != "stop" for sample in samples):
        return False
    texts = [tokenizer.decode(sample.ids) for sample in samples]
    if task is None:
        return all(text.strip() for text in texts)
    if task.kind == "categorical":
        return all(text.strip() == conversation["messages"][-1]["content"] for text in texts)
    return all(verdict == "pass" for verdict in task.verdicts([conversation] * len(texts), texts))
