"""What Schemathesis is told of our requests beyond the document (tests/abuse.py): how fields belong together.

JSON schema cannot say that a conversation ends with a question, or that `stream_options` goes with `stream`. Without
these mends nearly every request that follows the document would be refused before it reaches the model.
"""

import schemathesis
from schemathesis.generation import GenerationMode

ONE_OF = ("structured_outputs", "response_format", "tool_choice")  # at most one form of an answer


@schemathesis.hook
def before_call(context, case, kwargs):
    """Mend the body of a request that follows the document."""
    if case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
        mend(case.body)


def mend(body: dict) -> None:
    """Take out of a body what its other fields exclude, and let a conversation begin and end with a question."""
    for name, needed in {"stream_options": "stream", "top_logprobs": "logprobs", "tool_choice": "tools"}.items():
        if not body.get(needed):
            body.pop(name, None)
    for name in [name for name in ONE_OF if body.get(name) not in (None, "none", "auto", {"type": "text"})][1:]:
        del body[name]
    if "prompt" in body:
        body.pop("best_of", None)
        body["max_tokens"] = body.get("max_tokens") or 1
    if body.get("structured_outputs"):
        body["structured_outputs"] = {"choice": ["yes", "no"]}
    for name in ("messages", "input"):
        if isinstance(body.get(name), list):
            question = {"role": "user", "content": "Who are you?"}
            body[name] = [question, *body[name][:20], question]
