"""Optimizers, their update rules, and the schedules of their rates."""

from llm.optim.build import build_optimizer, params_by_kind
from llm.optim.optimizer import GroupOptimizer
from llm.optim.update_rules import ElementwiseRule, MatrixRule

__all__ = ["ElementwiseRule", "GroupOptimizer", "MatrixRule", "build_optimizer", "params_by_kind"]
