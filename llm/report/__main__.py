"""Rebuild a report: `python -m llm.report runs/demo`."""

import sys

from llm.report.report import main

sys.exit(main())
