"""Builds the Inside tab: tokens with their probabilities, attention, the logit lens, the calculator's steps."""

import base64
import math
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch

from llm.inference.calculator import calculate, explain
from llm.inference.inside import Inside
from llm.panel.markup import Markup, block, page, table, text

TOP = 8  # tokens of a table of what may come next
LENS_TOP = 3
COLOUR = (59, 130, 246)  # of attention; its strength is the share, so that it is seen on light and dark pages
SCALE = 0.5  # power of a share in its colour: small ones are seen too
MARKS = {"\n": "⏎\n", "\t": "⇥\t"}
CALL, CALL_END, OUT, OUT_END = "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"


def shown(token: str) -> str:
    """Return the text of a token with line breaks and tabs marked."""
    return "".join(MARKS.get(letter, letter) for letter in token)


def named(token: str) -> str:
    """Return the text of a token for a table: in quotes, blanks and line breaks seen."""
    return f"“{''.join(MARKS.get(letter, letter).strip() or '␣' for letter in token)}”" if token else "“”"


def logprobs_of(inside: Inside) -> torch.Tensor:
    """Return the log-probability (T,) in nats that the network gave each token; NaN for the first one."""
    found = torch.full((len(inside.ids),), float("nan"))
    if len(inside.ids) > 1:
        before = inside.logits[:-1].log_softmax(-1)
        found[1:] = before.gather(1, torch.tensor(inside.ids[1:]).unsqueeze(1)).squeeze(1)
    return found


def ranks_of(inside: Inside) -> list[int]:
    """Return the place of each token among those that the network found likely, 1 = the likeliest; 0 for the first."""
    own = inside.logits[:-1].gather(1, torch.tensor(inside.ids[1:], dtype=torch.long).unsqueeze(1))
    return [0, *((inside.logits[:-1] > own).sum(1) + 1).tolist()]


def tokens_view(inside: Inside, mask: Sequence[int], at: int) -> str:
    """Return the text in tokens, the likelier the network found one the stronger its colour; what was given is pale."""
    logprobs, ranks, spans = logprobs_of(inside), ranks_of(inside), []
    for place, token in enumerate(inside.tokens):
        share = float(logprobs[place].exp()) if place else 0.0
        told = f"position {place}: {named(token)}"
        told += f", probability {share:.3g}, logprob {float(logprobs[place]):.3f}, rank {ranks[place]}" if place else ""
        kind = " at" if place == at else ""
        kind += " chosen" if mask[place] else ""
        spans.append(_tinted(shown(token), share, told, place, kind))
    known = logprobs[torch.tensor(mask, dtype=torch.bool)] if any(mask) else logprobs[1:]
    whose = " of those that the model chose" if any(mask) else ""
    mean = float(known.mean()) if len(known) else 0.0
    about = f"{len(inside.ids)} tokens; mean logprob{whose} {mean:.3f} nats, perplexity {math.exp(-mean):.2f}"
    legend = "The stronger the colour, the likelier the model found the token." + (
        " Underlined tokens were chosen by the model; the others were given, or written by a tool." if any(mask) else ""
    )
    return page(
        f"<p><b>{about}.</b> {legend} A click chooses a position.</p>",
        f'<pre class="block tokens" tabindex="0">{"".join(spans)}</pre>',
    )


def _tinted(content: str, share: float, title: str, place: int, kind: str = "") -> str:
    strength = round(50 * max(0.0, min(share, 1.0)) ** SCALE)
    label = text(title)
    return (
        f'<span class="heat{kind}" data-at="{place}" style="--much: {strength}%" title="{label}">{text(content)}</span>'
    )


def next_view(inside: Inside, at: int, top: int = TOP) -> str:
    """Return what the network finds likely behind position `at`, and the place of the token that stands there."""
    at = _within(inside, at)
    logprobs = inside.logits[at].log_softmax(-1)
    best = logprobs.topk(min(top, len(logprobs)))
    follows = inside.ids[at + 1] if at + 1 < len(inside.ids) else None
    lines = [_candidate(inside, rank, one, number, follows) for rank, (number, one) in enumerate(_pairs(best), 1)]
    if follows is not None and follows not in best.indices.tolist():
        rank = int((logprobs > logprobs[follows]).sum()) + 1
        lines.append(_candidate(inside, rank, follows, float(logprobs[follows]), follows))
    entropy = float(-(logprobs.exp() * logprobs.clamp(min=-100)).sum())
    return page(
        f"<p><b>Behind position {at}, {text(named(inside.tokens[at]))}</b> the model expects "
        f"(entropy {entropy:.2f} nats; the token that follows is marked):</p>",
        table(["rank", "token", "probability", "logprob", "share"], lines, (0, 2, 3), "likely next tokens"),
    )


def _pairs(best: torch.return_types.topk) -> list[tuple[float, int]]:
    return list(zip(best.values.tolist(), best.indices.tolist(), strict=True))


def _candidate(inside: Inside, rank: int, token: int, logprob: float, follows: int | None) -> list[object]:
    share = float(np.exp(logprob))
    bar = Markup(f'<span class="bar" style="--much: {100 * share:.1f}%"></span>')
    mark = Markup(f"<b>{text(named(inside.token_text(token)))} ←</b>") if token == follows else None
    return [rank, mark or named(inside.token_text(token)), f"{share:.4f}", f"{logprob:.3f}", bar]


def positions_view(inside: Inside, top: int = 5) -> str:
    """Return a table of all positions: the token, how likely the network found it, and what it found likeliest."""
    logprobs, ranks, lines = logprobs_of(inside), ranks_of(inside), []
    for place, token in enumerate(inside.tokens):
        best = "" if not place else ", ".join(_percents(inside.likeliest(inside.logits[place - 1], top)))
        own = (
            [f"{float(logprobs[place].exp()):.4f}", f"{float(logprobs[place]):.3f}", ranks[place]]
            if place
            else [""] * 3
        )
        lines.append([place, named(token), *own, best])
    header = ["position", "token", "probability", "logprob", "rank", f"the {top} likeliest there"]
    return page(table(header, lines, (0, 2, 3, 4), "all positions"))


def _percents(pairs: Sequence[tuple[str, float]]) -> list[str]:
    return [f"{named(token)} {100 * share:.1f}\u00a0%" for token, share in pairs]


def attention_view(inside: Inside, layer: int, head: int, at: int) -> str:
    """Return where position `at` looks in one head, as coloured text, and the whole map (T, T) of the head."""
    n_layer, n_head = inside.attention.shape[:2]
    layer, head, at = max(0, min(layer, n_layer - 1)), max(0, min(head, n_head - 1)), _within(inside, at)
    shares = inside.attention[layer, head, at]
    spans = [
        _tinted(shown(token), float(shares[place]), f"{named(token)}: {100 * float(shares[place]):.1f} %", place,
                " at" if place == at else "")
        for place, token in enumerate(inside.tokens[: at + 1])
    ]  # fmt: skip
    order = sorted(range(at + 1), key=lambda place: -float(shares[place]))[:3]
    most = ", ".join(
        f"{named(inside.tokens[place])} (position {place}) {100 * float(shares[place]):.0f}\u00a0%" for place in order
    )
    whole = picture(inside.attention[layer, head], f"attention of layer {layer + 1}, head {head + 1}")
    about = "Rows: the position that looks, from the top. Columns: where it looks."
    return page(
        f"<p><b>Layer {layer + 1}, head {head + 1}:</b> from position {at}, {text(named(inside.tokens[at]))}, it looks "
        f"most at {text(most)}.</p>",
        f'<pre class="block tokens" tabindex="0">{"".join(spans)}</pre>',
        f'<figure class="map">{whole}<figcaption>{about}</figcaption></figure>',
    )


def heads_view(inside: Inside) -> str:
    """Return small maps of all heads, a row for each layer."""
    rows = []
    for layer, heads in enumerate(inside.attention, 1):
        maps = [
            f"<figure>{picture(one, f'layer {layer}, head {head}')}<figcaption>{layer}.{head}</figcaption></figure>"
            for head, one in enumerate(heads, 1)
        ]
        rows.append(f'<div class="heads">{"".join(maps)}</div>')
    about = "<p>Layer.head of each map; each row of a map is a position and sums to 1.</p>"
    return page(about, f'<div class="layers">{"".join(rows)}</div>')


def picture(weights: torch.Tensor, name: str) -> str:
    """Return a map (T, T) of shares as a picture of one pixel per share, which the page enlarges."""
    from PIL import Image

    strength = (weights.clamp(0, 1).numpy() ** SCALE * 255).round().astype(np.uint8)
    pixels = np.empty((*strength.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = COLOUR, strength
    file = BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, "PNG", optimize=True)
    code = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{text(name)}" title="{text(name)}" src="data:image/png;base64,{code}">'


def lens_view(inside: Inside, at: int) -> str:
    """Return the logit lens at one position: the likeliest next tokens behind every layer."""
    at = _within(inside, at)
    logits = [inside.lens(layer, at) for layer in range(len(inside.stream))]
    final = int(logits[-1].argmax())
    lines = []
    for layer, row in enumerate(logits):
        best = ", ".join(_percents(inside.likeliest(row, LENS_TOP)))
        lines.append([_layer_name(layer), best, f"{float(row.softmax(-1)[final]):.4f}"])
    header = ["behind", f"the {LENS_TOP} likeliest", f"share of {named(inside.token_text(final))}"]
    about = f"What the model would say at position {at}, {named(inside.tokens[at])}, if it ended behind a layer:"
    return page(f"<p>{text(about)}</p>", table(header, lines, (2,), "logit lens at one position"))


def lens_grid(inside: Inside) -> str:
    """Return the logit lens at all positions: the likeliest next token behind every layer, the last layer on top."""
    grid = []
    for layer in reversed(range(len(inside.stream))):
        name, tops = _layer_name(layer), inside.lens(layer).softmax(-1).max(-1)
        pairs = zip(tops.values.tolist(), tops.indices.tolist(), strict=True)
        cells = []
        for place, (share, token) in enumerate(pairs):
            told = f"{name}, position {place}: {share:.3f}"
            cells.append(Markup(_tinted(named(inside.token_text(token)), share, told, place)))
        grid.append([name, *cells])
    places = ["", *(f"{place} {named(token)}" for place, token in enumerate(inside.tokens))]
    return page("<p>The likeliest next token at every position:</p>", table(places, grid, (), "logit lens everywhere"))


def _layer_name(layer: int) -> str:
    return f"layer {layer}" if layer else "embedding"


def calculator_view(inside: Inside, mask: Sequence[int]) -> str:
    """Return the calls of the calculator in a text: what was written, its steps, what was put into the text."""
    calls, place = [], 0
    while CALL in inside.tokens[place:]:
        begin = inside.tokens.index(CALL, place)
        end = next((i for i in range(begin, len(inside.tokens)) if inside.tokens[i] == CALL_END), len(inside.tokens))
        written, result = "".join(inside.tokens[begin + 1 : end]), None
        after = end + 1
        if after < len(inside.tokens) and inside.tokens[after] == OUT:
            stop = next(
                (i for i in range(after, len(inside.tokens)) if inside.tokens[i] == OUT_END), len(inside.tokens)
            )
            result, after = "".join(inside.tokens[after + 1 : stop]), stop + 1
        calls.append(_call(len(calls) + 1, begin, written, result, any(mask[end + 1 : after])))
        place = max(after, begin + 1)
    if not calls:
        return page("<p>The text has no call of the calculator. Ask a question such as <i>What is 12 * 3?</i></p>")
    return page(*calls)


def _call(number: int, begin: int, written: str, result: str | None, is_own: bool) -> str:
    steps = [f"{place}. {step}" for place, step in enumerate(explain(written), 1)]
    answer = calculate(written)
    if result is None:
        end = "Nothing was written behind it: the call was left open, or the calculator does not know it."
    elif is_own:
        end = f"The model itself wrote the result {result}." + (f" The calculator has {answer}." if answer else "")
    else:
        end = f"The engine wrote the result {result} behind it; the model reads these tokens, and did not choose them."
    told = "\n".join([f"position {begin}: the model writes {written}", *steps, end])
    return f"<p><b>Call {number}</b></p>{block(told)}"


def _within(inside: Inside, at: int) -> int:
    return max(0, min(int(at), len(inside.ids) - 1))
