"""Runs a stage in one of several processes: the program that `llm.parallel.launch` starts.

python -m llm.stages.worker <config.json> <folder for errors>

Users call train.py instead.
"""

import sys
from pathlib import Path

from llm.config.plugins import load_plugins
from llm.config.trust import trust_command
from llm.errors import UserError, system_problem
from llm.parallel.env import begin, end, launched_rank, lost_another
from llm.utils.environment import keep_private, tune_process
from llm.utils.files import read_json
from llm.utils.streams import keep_going, open_streams


def main() -> None:
    """Run the stage of config.json as one of the processes; a UserError goes to a file that the launcher reads."""
    config, folder = sys.argv[1:]
    open_streams()
    begin()
    keep_private()
    keep_going()
    tune_process()
    from omegaconf import OmegaConf

    from llm.stages.run_stage import run_stage

    cfg = OmegaConf.create(read_json(Path(config)))
    OmegaConf.set_struct(cfg, True)
    try:
        trust_command(cfg)
        load_plugins(cfg.plugins)
        run_stage(cfg)
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else system_problem(error)
        if text is None and (reason := lost_another(error)):  # the launcher says who ended
            print(f"process {launched_rank()} has lost another one ({reason})", file=sys.stderr)
            end(1)
        if text is None:
            raise
        (Path(folder) / f"error_{launched_rank():04d}").write_text(text, encoding="utf-8")
        end(2)
    except SystemExit as stop:
        end(stop.code or 0)
    end(0)


if __name__ == "__main__":
    main()
