"""Looking into a network on its way from a text to the next token: attention, the stream between blocks, logits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llm.errors import UserError
from llm.model.attention import pair_heads
from llm.model.cached_attention import AttentionOptions
from llm.model.gpt import GPT


@dataclass(frozen=True)
class Inside:
    """One pass of a network over T tokens, on the CPU in fp32. L: layers, H: heads, V: vocabulary, E: width.

    ids: the tokens, `tokens`: their texts. logits: (T, V), row t for the token behind position t. attention:
    (L, H, T, T), of which [layer, head, t, s] is the share that position t takes from position s; rows sum to 1.
    stream: (L + 1, T, E), the input of the first block and then what leaves each block; the last one is what the final
    norm gets, without the part that `arch.backout` takes off.
    """

    ids: list[int]
    tokens: list[str]
    logits: torch.Tensor
    attention: torch.Tensor
    stream: torch.Tensor
    _net: GPT = field(repr=False)
    _tokenizer: Any = field(repr=False)

    @torch.inference_mode()
    def lens(self, layer: int, at: int | None = None) -> torch.Tensor:
        """Return the logits (T, V) that the network would give if it ended behind `layer` blocks, from 0 to L.

        This is the logit lens: the stream at that place goes through the final norm and the head. At L they are
        `logits`. at: a position, whose row (V,) alone is computed. Raises ValueError for a layer that does not exist.
        """
        if not 0 <= layer < len(self.stream):
            raise ValueError(f"layer={layer} must be between 0 and {len(self.stream) - 1}")
        stream = self.stream[layer] if at is None else self.stream[layer, at].unsqueeze(0)
        stream = stream.to(self._net.device, self._net.compute_dtype)
        logits = self._net.logits(self._net.final_norm(stream.unsqueeze(0)))[0].float().cpu()
        return logits if at is None else logits[0]

    def likeliest(self, logits: torch.Tensor, n: int = 5) -> list[tuple[str, float]]:
        """Return the `n` likeliest tokens of a row of logits (V,), as texts with their probabilities, best first."""
        shares, ids = logits.softmax(-1).topk(min(n, len(logits)))
        return [(self.token_text(one), share) for one, share in zip(ids.tolist(), shares.tolist(), strict=True)]

    def token_text(self, token: int) -> str:
        """Return the text of any token of the vocabulary."""
        return token_text(self._tokenizer, token)


def token_text(tokenizer: Any, token: int) -> str:
    """Return the text of one token; bytes that are no whole letter by themselves as `\\xe2`."""
    text = tokenizer.decode([token])
    if "\ufffd" not in text or not hasattr(tokenizer, "decode_bytes"):
        return text
    return tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")


@torch.inference_mode()
def look_inside(net: GPT, tokenizer: Any, ids: Sequence[int]) -> Inside:
    """Run a network over `ids` and keep what it computes. Needs memory for L * H * T * T numbers.

    Raises UserError for a network whose blocks do not attend as ours do, and for more tokens than the context holds.
    """
    if not isinstance(net, GPT):
        raise UserError("only models that Fathom has trained can be looked into")
    if not 1 <= len(ids) <= net.config.seq_len:
        raise UserError(f"{len(ids):,} tokens: there must be 1 to {net.config.seq_len:,}, the model's context")
    was_training, recorder, stream = net.training, Recorder(net), []
    blocks = list(net.transformer.h)
    hooks = [
        blocks[0].register_forward_pre_hook(lambda block, inputs: stream.append(inputs[0][0])),
        *(block.register_forward_hook(lambda block, inputs, output: stream.append(output[0])) for block in blocks[:-1]),
        net.final_norm.register_forward_pre_hook(lambda norm, inputs: stream.append(inputs[0][0])),
    ]
    try:
        logits = net.eval()(torch.tensor([list(ids)], device=net.device), cache=recorder)[0]
    finally:
        net.train(was_training)
        for hook in hooks:
            hook.remove()
    if sorted(recorder.weights) != list(range(len(blocks))):
        raise UserError(
            f"arch={net.config.arch}: its blocks do not attend by llm.model.attention, nothing can be shown"
        )
    attention = torch.stack([recorder.weights[layer] for layer in range(len(blocks))])
    texts = [token_text(tokenizer, one) for one in ids]
    return Inside(list(ids), texts, _kept(logits), attention, _kept(torch.stack(stream)), net, tokenizer)


def _kept(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.float().cpu()


class Recorder:
    """A pass over one row, the `cache` argument of the network, that keeps the weights (H, T, T) of each layer."""

    def __init__(self, net: GPT) -> None:
        self.weights: dict[int, torch.Tensor] = {}
        # Nothing stands before the first token, of which a part could be mixed into it.
        self.last_embed = torch.zeros(1, 1, net.config.n_embd, device=net.device, dtype=net.compute_dtype)
        self.last_ids: torch.Tensor | None = None  # nor an id that belongs to an n-gram or a match
        self.fed = self.fed_ids = None

    def expect(self, lengths: torch.Tensor | None) -> None:
        """Take all tokens as true ones."""

    def advance(self, n_new: int) -> None:
        """Keep no tokens for later."""

    def positions(self, n_new: int) -> torch.Tensor:
        """Return the positions (1, n_new) of the tokens."""
        return torch.arange(n_new, device=self.last_embed.device).unsqueeze(0)

    def keys_before(self, layer: int, k: torch.Tensor) -> torch.Tensor:
        """Return k's first keys (1, 1, Hkv, D): nothing stands before them."""
        return k[:, :1]

    def attend(self, layer: int, q, k, v, positions, options: AttentionOptions) -> torch.Tensor:
        """Return the attention (1, T, H, D) of queries (1, T, H, D) over keys and values (1, T, Hkv, D), in fp32.

        Of paired heads a weight is the sum of those of both keys of a token.
        """
        shape, window = q.shape, options.window
        if options.paired:
            q, k, v = (pair_heads(x) for x in (q, k, v))
            window = None if window is None else 2 * window
        groups = q.size(2) // k.size(2)
        query, key, value = (x[0].float().transpose(0, 1) for x in (q, k, v))  # (H, T, D)
        key, value = (x.repeat_interleave(groups, dim=0) for x in (key, value))
        at = torch.arange(q.size(1), device=q.device)
        distance = at.unsqueeze(1) - at
        hidden = (distance < 0) if window is None else (distance < 0) | (distance > window)
        scores = (options.scale * query @ key.transpose(1, 2)).masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1)
        y = (weights @ value).transpose(0, 1).to(q.dtype)
        if options.paired:
            (_, T, H, _), weights = shape, weights.unflatten(2, (-1, 2)).sum(-1)  # (H / 2, 2 T, T)
            weights = weights.view(H // 2, T, 2, T).permute(2, 0, 1, 3).flatten(0, 1)
        self.weights[layer] = _kept(weights)
        return y.reshape(shape)
