"""First use of a model, so that the first answer of a chat is not slow: kernels are built, modules imported."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llm.inference.sampling import SamplingParams


def warm_up(engine: Any) -> None:
    """Write two tokens, whatever they are. Ctrl-C meanwhile is raised at the end: half an import would be worse."""
    with interrupt_held_back():
        params = SamplingParams(temperature=0.5, top_k=2, max_new_tokens=2, seed=0, use_tools=False)
        room = engine.net.config.seq_len - params.max_new_tokens
        engine.generate([[engine.tokenizer.bos_id] * max(1, min(8, room))], params)


@contextmanager
def interrupt_held_back() -> Iterator[None]:
    """Hold back SIGINT while the block runs, and let its handler have it behind it. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple] = []
    before = signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[0])
