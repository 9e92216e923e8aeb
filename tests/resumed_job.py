"""A process of tests/parallel/test_post_training.py: `resumed_job.py <runs> <file>`, launched.

The JSON file has the settings of trainings by name. Each is trained twice: as the run `<name>-straight`, and as
`<name>-killed`, which finds the files that a kill after the third step would have left.
"""

# ruff: noqa: E402  before the imports, which take seconds: a parent that is gone by then would not be missed
from llm.utils.environment import die_with_parent

die_with_parent()

import json
import shutil
import sys
from pathlib import Path

from conftest import compose

from llm.parallel import collectives
from llm.parallel.env import end
from llm.run.stage_folder import write_manifest
from llm.stages.run_stage import run_stage


def as_if_killed(straight: Path, killed: Path, stage: str) -> None:
    """Copy a run without the result of a stage and without its checkpoints behind the third step."""
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / stage / "model")
    for step in (4, 5):
        (killed / stage / "checkpoints" / f"step_{step:06}.ckpt").unlink()
    write_manifest(killed / stage, json.loads((killed / stage / "run.json").read_text()) | {"status": "running"})


def main() -> None:
    runs, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for name, lines in cases.items():
        cfg = compose("train", *lines, f"paths.runs={runs}", f"run={name}-straight")
        run_stage(cfg)
        if collectives.is_main():
            as_if_killed(runs / f"{name}-straight", runs / f"{name}-killed", cfg.stage.name)
        collectives.barrier()
        run_stage(compose("train", *lines, f"paths.runs={runs}", f"run={name}-killed"))
    collectives.barrier()
    end(0)


if __name__ == "__main__":
    main()
