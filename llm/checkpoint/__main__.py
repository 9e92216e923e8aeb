"""List what a run holds and verify every checksum: `python -m llm.checkpoint runs/demo`."""

from llm.checkpoint.resume import main

main()
