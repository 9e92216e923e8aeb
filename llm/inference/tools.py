"""Tools that a model calls within its text: results are written into the text behind the call."""

from typing import Any

from llm.inference.calculator import calculate
from llm.inference.request import Request


class Calculator:
    """Calculator calls: when a row closes its python markers, queue the result to be written into that row.

    An expression that cannot be calculated queues nothing, and the model goes on by itself.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        names = ("python_start", "python_end", "output_start", "output_end")
        self.start, self.end, self.output_start, self.output_end = (
            tokenizer.special_id(f"<|{name}|>") for name in names
        )

    def observe(self, request: Request, token: int) -> None:
        """Follow one sampled token of a request; `tool_state` holds the tokens of a call that is open."""
        if token == self.start:
            request.tool_state = []
        elif request.tool_state is None:
            return
        elif token != self.end:
            request.tool_state.append(token)
        else:
            result = calculate(self.tokenizer.decode(request.tool_state))
            request.tool_state = None
            if result is not None:
                request.forced.extend((self.output_start, *self.tokenizer.encode(result), self.output_end))
