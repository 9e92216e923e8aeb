"""Writes a small text and conversations in Hindi, and measures what a tokenizer of one's own is worth there.

python docs/guide/examples/16_own.py [--seed 0] [--out my_data/guide] [--plot PATH]
"""

import argparse
import json
import random
from itertools import islice, product
from pathlib import Path

import matplotlib.pyplot as plt
import regex

from llm.data.embedded import documents
from llm.tokenizer.bpe import Tokenizer, split_pattern

NAMES = "राम मोहन अमित सुरेश विजय अनिल सुनील राजेश दीपक संजय".split()
FAMILIES = "शर्मा वर्मा गुप्ता सिंह यादव पटेल कुमार जोशी मिश्रा चौहान".split()
CITIES = "दिल्ली मुंबई जयपुर लखनऊ पटना भोपाल नागपुर इंदौर".split()
ANIMALS, FRUITS = "कुत्ता घोड़ा हाथी तोता खरगोश".split(), "आम केला सेब पपीता संतरा".split()


def person(name: str, rng: random.Random) -> tuple[str, list[dict]]:
    """Return a document about a person (where he lives, what he has and likes), and conversations that ask for it."""
    city, animal, fruit = rng.choice(CITIES), rng.choice(ANIMALS), rng.choice(FRUITS)
    facts = [
        (f"{name} कहाँ रहता है?", f"{name} {city} में रहता है।"),
        (f"{name} के पास क्या है?", f"{name} के पास एक {animal} है।"),
        (f"{name} को क्या पसंद है?", f"{name} को {fruit} पसंद है।"),
    ]
    lines = [" ".join(fact for _, fact in rng.sample(facts, 3)) for _ in range(8)]
    roles = ("user", "assistant")
    talks = [
        {"messages": [{"role": r, "content": text} for r, text in zip(roles, fact, strict=True)]} for fact in facts
    ]
    return "\n".join(lines), talks


parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="my_data/guide")
parser.add_argument("--plot", default="docs/guide/images/16_own.png")
args = parser.parse_args()
rng, out = random.Random(args.seed), Path(args.out)

people = [person(f"{name} {family}", rng) for name, family in product(NAMES, FAMILIES)]
rng.shuffle(people)
for split, part in (("train", people[:90]), ("val", people[90:])):  # ten people are held out
    for folder in ("text", "chat"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text, _ in part]
    talks = [json.dumps(talk, ensure_ascii=False) for _, many in part for talk in many]
    (out / "text" / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (out / "chat" / f"{split}.jsonl").write_text("\n".join(talks) + "\n", encoding="utf-8")

hindi, held_out = [text for text, _ in people[:90]], "\n".join(text for text, _ in people[90:])
english = list(islice(documents("train", 2000, args.seed, 0), 2000))
word = "दिल्ली"
for marks in (False, True):
    pieces = regex.findall(split_pattern(marks=marks), word)
    print(f"pieces of one word with stage.marks={str(marks).lower()}: {len(pieces)}")
tokenizers = {
    "English": Tokenizer.train(english, 384),
    "own": Tokenizer.train(hindi, 384),
    "own with marks": Tokenizer.train(hindi, 384, split_pattern(marks=True)),
}
size = len(held_out.encode())
values = {name: size / len(tokenizer.encode(held_out)) for name, tokenizer in tokenizers.items()}
for name, value in values.items():
    print(f"{name}, bytes per token: {value:.2f}")
plt.bar(list(values), list(values.values()))
plt.gca().set(ylabel="bytes per token", title="held-out Hindi text, vocabulary of 384")
plt.gcf().set_size_inches(6, 3)
plt.tight_layout()
plt.savefig(args.plot, dpi=90)
