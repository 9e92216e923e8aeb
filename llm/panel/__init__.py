"""The panel: runs, comparisons and trainings in a browser, `python serve.py ui=panel`; see docs/panel.md."""
