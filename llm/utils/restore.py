"""Puts back what a command changes in its process: variables, signal handlers, logging, random state, torch's settings.

Imports no torch by itself: its settings are put back where somebody has imported it before.
"""

import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def process_as_it_was() -> Iterator[None]:
    """Put back at the end of the block, also after an exception, what lies outside of it in this process.

    That is: environment variables, `sys.argv`, signal handlers, filters of warnings, levels and handlers of loggers,
    the garbage collector, Hydra's configuration, the random state of Python, numpy and torch, and torch's threads,
    precision and switches.
    """
    restore = [part() for part in (_environment, _signals, _logging, _garbage, _hydra, _random, _torch)]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for put_back in restore:
            put_back()


def _environment() -> Callable[[], None]:
    variables, arguments = dict(os.environ), list(sys.argv)

    def put_back() -> None:
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update({name: text for name, text in variables.items() if os.environ.get(name) != text})
        sys.argv[:] = arguments

    return put_back


def _signals() -> Callable[[], None]:
    """Remember all handlers that Python knows; only the main thread can set, and so change, them."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    handlers = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}

    def put_back() -> None:
        for signum, handler in handlers.items():
            if handler is not None and signal.getsignal(signum) is not handler:
                signal.signal(signum, handler)

    return put_back


def _logging() -> Callable[[], None]:
    loggers = [logging.root, *(one for one in logging.root.manager.loggerDict.values() if hasattr(one, "handlers"))]
    before = [(one, one.level, one.handlers[:], one.propagate, one.disabled) for one in loggers]
    threshold = logging.root.manager.disable

    def put_back() -> None:
        for logger, level, handlers, propagate, disabled in before:
            if logger.level != level:
                logger.setLevel(level)
            logger.handlers[:], logger.propagate, logger.disabled = handlers, propagate, disabled
        logging.disable(threshold)

    return put_back


def _garbage() -> Callable[[], None]:
    was_enabled, frozen = gc.isenabled(), gc.get_freeze_count()

    def put_back() -> None:
        if gc.get_freeze_count() > frozen:
            gc.unfreeze()
        (gc.enable if was_enabled else gc.disable)()

    return put_back


def _hydra() -> Callable[[], None]:
    """Remember what a notebook composes with, as `hydra.initialize` may be in force there, and begin without."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    held, own = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().hydra = None

    def put_back() -> None:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = held, own

    return put_back


def _random() -> Callable[[], None]:
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)

    return put_back


def _torch() -> Callable[[], None]:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return lambda: None
    on_gpu = torch.cuda.is_initialized()
    state, states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else []
    settings = [
        (torch.set_num_threads, torch.get_num_threads()),
        (torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()),
        (torch.set_default_dtype, torch.get_default_dtype()),
        (torch.set_grad_enabled, torch.is_grad_enabled()),
        (torch.autograd.set_detect_anomaly, torch.is_anomaly_enabled()),
        (torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode()),
    ]
    cudnn = torch.backends.cudnn
    flags = [(cudnn, name, getattr(cudnn, name)) for name in ("benchmark", "deterministic", "allow_tf32")]
    if compiler := sys.modules.get("torch._functorch.config"):
        name = "autograd_cache_allow_custom_autograd_functions"
        flags.append((compiler, name, getattr(compiler, name)))

    def put_back() -> None:
        torch.set_rng_state(state)
        if on_gpu:
            torch.cuda.set_rng_state_all(states)
        for change, value in settings:
            change(value)
        for place, name, value in flags:
            setattr(place, name, value)

    return put_back
