"""Show what a stage trains on: `python -m llm.stages experiment=demo stage=sft`."""

from llm.stages.show_batch import main

main()
