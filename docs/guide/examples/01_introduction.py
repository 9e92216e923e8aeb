"""Chapter 1, introduction: what each stage of a small pipeline has learnt.

Needs the run guide-introduction: the command stands in the chapter.
"""

import argparse

import llm
from llm.run.stage_folder import RunDir, read_metrics
from llm.utils.files import read_json

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--runs", default="runs", help="folder of the runs")
parser.add_argument("--plot", help="write the picture to this file")
args = parser.parse_args()
run = RunDir(args.runs, "guide-introduction")

# 1. The tokenizer makes text shorter.
found = read_json(run.stage_dir("tokenizer") / "run.json")["metrics"]
print(f"tokenizer, bytes per token: {found['bytes_per_token_val']:.2f}")

# 2. Pretraining and finetuning make held-out text less surprising.
curves = {}
for stage in ("pretrain", "sft"):
    rows = read_metrics(run.stage_dir(stage))
    curves[stage] = {row["step"]: row["bpb"] for row in rows if "bpb" in row}
    steps = sorted(curves[stage])
    print(f"{stage}, bits per byte before: {curves[stage][steps[0]]:.2f}")
    print(f"{stage}, bits per byte after: {curves[stage][steps[-1]]:.2f}")
print(f"sft, questions about itself, share right: {rows[-1]['chat/identity']:.2f}")
print(f"sft, multiple choice, share right: {rows[-1]['chat/choice']:.2f}")

# 3. The same words for both models. The first continues a text, the second answers.
base, chat = (llm.load(run.stage_dir(stage)) for stage in ("pretrain", "sft"))
for question in ("Where does the goat live?", "Who are you?"):
    print(f"question:         {question}")
    print(f"pretrain goes on: {base.generate(question, temperature=0, max_new_tokens=24)!r}")
    print(f"sft answers:      {chat.chat(question, temperature=0, max_new_tokens=24)!r}")

if args.plot:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="tight")
    for axis, (stage, scores) in zip(axes, curves.items(), strict=True):
        axis.plot(list(scores), list(scores.values()), marker="o")
        axis.set(title=stage, xlabel="step")
    axes[0].set(ylabel="bits per byte, held out", ylim=(0, None))
    figure.savefig(args.plot, dpi=80)
