"""Finetuning and evaluation tasks: data, prompts and scoring, no model code."""

from tasks.base import Task, dialogue
from tasks.files import need
from tasks.hub import Cache
from tasks.mixture import Mixture
from tasks.registry import bad_rows, build_mixture, build_task, held_out_mixture

__all__ = [
    "Cache",
    "Mixture",
    "Task",
    "bad_rows",
    "build_mixture",
    "build_task",
    "dialogue",
    "held_out_mixture",
    "need",
]
