"""A callback with which tests/chaos.py kills a process of a training in a chosen part of it.

The environment variable FATHOM_TEST_STRIKE says where, `<part>:<call>:<milliseconds>`: so long after the part has begun
for that number of times since the process started. Without it nothing happens, so the command is the same.
"""

import os
import signal
import threading

import lightning as L

from callbacks.chat_eval import PassAtK
from callbacks.metrics import MetricsLog
from callbacks.preference_eval import PreferenceEval, WinRate
from llm.checkpoint import resume
from llm.data.preferences import PreferenceSteps
from llm.optim.optimizer import GroupOptimizer
from llm.parallel import collectives
from llm.stages.rollouts import RolloutSteps
from llm.stages.step_module import StepModule

STRIKE = "FATHOM_TEST_STRIKE"
SETTING = "+callbacks.strike._target_=striking.Strike"
PARTS = {
    "rollout": ((RolloutSteps, "ask"), (PreferenceSteps, "batch")),
    "update": ((StepModule, "passes"),),
    "optimizer": ((GroupOptimizer, "step"),),
    "evaluation": ((PassAtK, "act"), (PreferenceEval, "act"), (WinRate, "act")),
    "checkpoint": ((resume, "write_checkpoint"),),
    "row": ((MetricsLog, "_log"),),
}


class Strike(L.Callback):
    """SIGKILL to the last process of the job, at the moment that the environment tells."""

    def on_fit_start(self, trainer, module) -> None:
        if STRIKE not in os.environ or collectives.rank() != collectives.world_size() - 1:
            return
        part, call, milliseconds = os.environ[STRIKE].split(":")
        self.left, self.seconds = int(call), int(milliseconds) / 1000
        for owner, name in PARTS[part]:
            setattr(owner, name, self.counting(getattr(owner, name)))

    def counting(self, function):
        def counted(*args, **options):
            self.left -= 1
            if self.left == 0:
                threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return function(*args, **options)

        return counted
