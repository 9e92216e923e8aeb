"""The folder of a run: where stages write, and how they find each other. No torch is imported here."""

from llm.run.stage_folder import RunDir, find_parent, find_stage, list_runs, read_manifest, read_metrics

__all__ = ["RunDir", "find_parent", "find_stage", "list_runs", "read_manifest", "read_metrics"]
