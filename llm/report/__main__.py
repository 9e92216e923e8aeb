"""Rebuild a report: `python -m llm.report runs/demo`."""

from llm.report.report import main
from llm.utils.streams import run_and_exit

run_and_exit(main)
