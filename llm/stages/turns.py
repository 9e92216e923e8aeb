"""Conversations of several turns: a task replies to what the model answers, and the model answers again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from llm.eval.task_scores import Draw
from llm.inference.engine import Completion, Engine
from llm.inference.sampling import SamplingParams

NEXT_TURN = 32_452_843  # between the seeds of turns
Reply = Callable[[dict, str], str | None]


@dataclass
class Turns(Completion):
    """All turns of one conversation behind its prompt, as one completion. What the task says has mask 0.

    last: where the last answer begins among the ids; earlier: pairs (answer, reply of the task) before it.
    """

    last: int = 0
    earlier: list[tuple[str, str]] = field(default_factory=list)

    def extended(self, sample: Completion) -> "Turns":
        """Return these turns with a further answer."""
        own = [*self.logprobs, *sample.logprobs]
        ids, mask = [*self.ids, *sample.ids], [*self.mask, *sample.mask]
        end = sample.finish_reason, sample.stop_id, own, sample.stop_logprob
        return Turns(ids, mask, *end, last=len(self.ids), earlier=self.earlier)

    def replied(self, answer: str, text: str, ids: Sequence[int]) -> "Turns":
        """Return these turns with the end of the model's, which was sampled, and the tokens of the task's reply."""
        ended = [] if self.stop_id is None else [self.stop_id]
        n, has_logprobs = len(ids), bool(self.logprobs) or self.stop_logprob is not None  # an answer may be empty
        return Turns(
            [*self.ids, *ended, *ids],
            [*self.mask, *[1] * len(ended), *[0] * n],
            logprobs=[*self.logprobs, *[self.stop_logprob] * len(ended), *[None] * n] if has_logprobs else [],
            last=self.last,
            earlier=[*self.earlier, (answer, text)],
        )


def answer_in_turns(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    conversations: Sequence[dict],
    params: SamplingParams,
    num_samples: int,
    reply: Reply,
    turns: int,
) -> list[list[Turns]]:
    """Return `num_samples` conversations for each prompt, as [prompt][sample]; each has at most `turns` answers.

    reply: (conversation, answer) -> what the task says to an answer, None where it says nothing more. The conversation
    has the turns before under "earlier". The unfinished conversations of all prompts are continued together, turn by
    turn. `params.max_new_tokens` is the room for all turns of a conversation, replies included: one that has used it up
    ends with finish_reason "length".
    """
    done = [Turns() for _ in prompts for _ in range(num_samples)]
    owner = [i for i in range(len(prompts)) for _ in range(num_samples)]
    rooms = [min(params.max_new_tokens, engine.net.config.seq_len - len(prompt)) for prompt in prompts]
    drawn, going = engine.generate(prompts, params, num_samples), list(range(len(done)))
    for turn in range(1, turns + 1):
        for k, sample in zip(going, (sample for group in drawn for sample in group), strict=True):
            done[k] = done[k].extended(sample)
        if turn == turns:
            break
        replied = {k: _replied(engine.tokenizer, done[k], conversations[owner[k]], reply) for k in going}
        going = [k for k in going if replied[k] is not None and len(replied[k].ids) < rooms[owner[k]]]
        if not going:
            break
        settings = []
        for k in going:
            done[k] = replied[k]
            left, seed = params.max_new_tokens - len(done[k].ids), params.seed + turn * NEXT_TURN
            settings.append(replace(params, max_new_tokens=left, seed=seed))
        drawn = engine.generate([[*prompts[owner[k]], *done[k].ids] for k in going], settings)
    return [done[i * num_samples : (i + 1) * num_samples] for i in range(len(prompts))]


def _replied(tokenizer, turns: Turns, conversation: dict, reply: Reply) -> Turns | None:
    """Return turns with the task's reply to the last answer; None where the model was cut off, or there is no reply."""
    if turns.finish_reason != "stop" or turns.stop_id is None:
        return None
    answer = tokenizer.decode(turns.ids[turns.last :])
    text = reply(conversation | {"earlier": turns.earlier}, answer)
    if text is None:
        return None
    start, end, begin = (tokenizer.special_id(f"<|{name}|>") for name in ("user_start", "user_end", "assistant_start"))
    return turns.replied(answer, text, [start, *tokenizer.encode(text), end, begin])


def last_answer(sample: Completion) -> int:
    """Return where the last answer of a completion of one or more turns begins among its ids."""
    return sample.last if isinstance(sample, Turns) else 0


def judged(conversation: dict, sample: Completion) -> dict:
    """Return a conversation as it is judged: with the turns before its last answer under "earlier"."""
    return conversation | {"earlier": sample.earlier} if isinstance(sample, Turns) and sample.earlier else conversation


def draw_in_turns(reply: Reply, turns: int) -> Draw:
    """Return the function that draws conversations of at most `turns` answers, to be judged by the last one."""

    def draw(engine, conversations, prompts, params, num_samples):
        drawn = answer_in_turns(engine, prompts, conversations, params, num_samples, reply, turns)
        return [
            [(judged(conversation, one), engine.tokenizer.decode(one.ids[last_answer(one) :])) for one in samples]
            for conversation, samples in zip(conversations, drawn, strict=True)
        ]

    return draw
