"""Optimizers and the schedules of their rates."""

from llm.optim.build import build_optimizer
from llm.optim.muon_adamw import MuonAdamW

__all__ = ["MuonAdamW", "build_optimizer"]
