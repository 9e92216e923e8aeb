"""Rebuild a report, or print a table over all runs: `python -m llm.report`."""

import sys

from llm.report.report import main

sys.exit(main())
