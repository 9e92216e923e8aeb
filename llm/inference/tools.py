"""Tools that a model calls within its text: results are written into the text behind the call."""

from collections.abc import Callable
from typing import Any

from llm.inference.calculator import calculate
from llm.inference.request import Request

Runner = Callable[[str], str]  # from the text of a call to its result; may take seconds


class Tools:
    """Calls between a model's python markers: the calculator answers at once, what it cannot answer may be run.

    run: given, it gets the calls that are not the calculator's. Without it such a call has no result, and the model
    goes on by itself.
    """

    def __init__(self, tokenizer: Any, run: Runner | None = None):
        self.tokenizer, self.run = tokenizer, run
        names = ("python_start", "python_end", "output_start", "output_end")
        self.start, self.end, self.output_start, self.output_end = (
            tokenizer.special_id(f"<|{name}|>") for name in names
        )

    def observe(self, request: Request, token: int) -> str | None:
        """Follow one sampled token of a request; return the text of a call that is to be run.

        `request.call` holds the tokens of a call that is open. A result of the calculator is queued as forced tokens.
        """
        if token == self.start:
            request.call = []
        elif request.call is None:
            pass
        elif token != self.end:
            request.call.append(token)
        else:
            text, request.call = self.tokenizer.decode(request.call), None
            result = calculate(text)
            if result is not None:
                request.forced.extend(self.written(result))
            elif self.run:
                return text
        return None

    def written(self, result: str) -> list[int]:
        """Return the tokens of a result as they stand in the text."""
        return [self.output_start, *self.tokenizer.encode(result), self.output_end]
