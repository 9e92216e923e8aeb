"""Tokens per second of sampling, and how many times those of a plain loop: one stream, many samples, an RL load.

    python bench/decode.py [--depth 4] [--vocab 8192] [--prompt 128] [--tokens 64] [--repeats 3] [--arch modern]
                           [--dtype auto] [--clock wall]

The engine writes 1, 16 and 64 samples of one prompt, and the load of a step of reinforcement learning: 16 samples of
each of 16 prompts, twice as many tokens. The plain loop stands for what people write by hand, in fp32: it computes one
prompt, copies its keys and values for every sample, and feeds one token per row and step to PyTorch's attention. It
takes prompt after prompt. Both ways take turns in one process; weights are random, and nobody ends a turn. On a busy
machine `OMP_NUM_THREADS=1` with `--clock cpu` gives ratios of computing times. Prints a table and a last line of JSON;
`ratio_...` is engine over plain loop.
"""

import _bench  # isort: skip  (puts the project on the path)
import time

import torch
import torch.nn.functional as F

from llm.cli.overrides import compose
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.model.attention import apply_rotary
from llm.model.config import SMEAR_CHANNELS
from llm.model.gpt import GPT
from llm.scaling.rules import model_config

LOADS = {"1": (1, 1, 1), "16": (1, 16, 1), "64": (1, 64, 1), "rl": (16, 16, 2)}  # prompts, samples, times --tokens


class Numbers:
    """Tokenizer without words, tools and ends of turns."""

    bos_id, has_tools, stop_ids = -1, False, frozenset()


def norm(x: torch.Tensor) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last dimension."""
    return F.rms_norm(x, (x.size(-1),))


class PlainLoop:
    """Sampling of one prompt by a loop over steps with a key/value cache: no tricks, fp32, PyTorch's own kernels.

    It knows classic and modern networks with full attention (the windows of a model this small reach the whole row).
    """

    def __init__(self, net: GPT):
        self.net, self.config = net, net.config
        assert not any(net.windows), "the plain loop has no windows"

    @torch.inference_mode()
    def generate(self, prompt: list[int], samples: int, tokens: int) -> list[list[int]]:
        """Return `samples` continuations of a prompt, `tokens` long, drawn at temperature 1."""
        c, device = self.config, self.net.device
        shape = (2, c.n_layer, 1, len(prompt) + tokens, c.n_kv_head, c.head_dim)
        self.cache, self.used, self.before = torch.zeros(shape, device=device), 0, None
        logits = self._forward(torch.tensor([prompt], device=device))
        self.cache = self.cache.expand(-1, -1, samples, -1, -1, -1).clone()
        logits = logits.expand(samples, -1)
        if self.before is not None:
            self.before = self.before.expand(samples, -1, -1)
        rows: list[list[int]] = [[] for _ in range(samples)]
        for step in range(tokens):
            ids = torch.multinomial(torch.softmax(logits, dim=-1), 1)
            for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
                row.append(token)
            if step < tokens - 1:
                logits = self._forward(ids)
        return rows

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, V) behind new tokens (B, T), whose keys and values join the cache."""
        net, c, T = self.net, self.config, ids.size(1)
        x = norm(net.transformer.wte(ids))
        if c.smear:
            before = torch.cat((torch.zeros_like(x[:, :1]) if self.before is None else self.before, x[:, :-1]), dim=1)
            self.before = x[:, -1:]
            x = x + net.smear_scalar * torch.sigmoid(net.smear_gate(x[..., :SMEAR_CHANNELS])) * before
        x0 = x
        for layer, block in enumerate(net.transformer.h):
            if c.residual_scalars:
                x = net.resid_scalars[layer] * x + net.x0_scalars[layer] * x0
            values = net.value_embeds[str(layer)](ids) if c.has_value_embed(layer) else None
            x = x + self._attention(layer, block.attn, norm(x), values)
            x = x + block.mlp.c_proj(F.relu(block.mlp.c_fc(norm(x))).square())
            if layer == c.n_layer // 2:
                middle = x
        if c.backout:
            x = x - net.backout_scalar * middle
        self.used += T
        logits = F.linear(norm(x[:, -1]), net.head_weight)
        return c.softcap * torch.tanh(logits / c.softcap)

    def _attention(self, layer: int, attn, x: torch.Tensor, values: torch.Tensor | None) -> torch.Tensor:
        """Return a layer's attention (B, T, C) of the normed input over the cache."""
        B, T, end = *x.shape[:2], self.used + x.size(1)
        q, k, v = (proj(x).view(B, T, -1, attn.head_dim) for proj in (attn.c_q, attn.c_k, attn.c_v))
        if values is not None:
            gate = attn.gate_range * torch.sigmoid(attn.ve_gate(x[..., : attn.gate_channels]))
            v = v + gate.unsqueeze(-1) * values.view_as(v)
        rotary = self.net.cos[self.used : end], self.net.sin[self.used : end]
        q, k = norm(apply_rotary(q, *rotary)), norm(apply_rotary(k, *rotary))
        keys, old_values = self.cache[:, layer, :, :end]
        keys[:, self.used :], old_values[:, self.used :] = k, v
        q, k, v = (t.transpose(1, 2) for t in (q, keys, old_values))
        is_grouped = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=attn.scale, enable_gqa=is_grouped)
        return attn.c_proj(y.transpose(1, 2).reshape(B, T, -1))


def main() -> None:
    """Run all loads both ways and print rates and ratios."""
    numbers = {"depth": 4, "vocab": 8192, "prompt": 128, "tokens": 64, "repeats": 3}
    args = _bench.arguments(__doc__, numbers, arch="modern", clock="wall")
    cfg = compose("train", [f"model=d{args.depth}", "model.seq_len=512", f"arch={args.arch}", "arch.window_pattern=L"])
    torch.manual_seed(0)
    net = GPT(model_config(cfg.model, cfg.arch, args.vocab)).init_weights(0).to(_bench.DEVICE)
    net.compute_dtype = args.dtype
    engine, plain = Engine(net, Numbers()), PlainLoop(net)
    prompts = torch.randint(1, args.vocab, (16, args.prompt)).tolist()
    steps, written = {}, {}
    for name, (n_prompts, samples, times) in LOADS.items():
        some, tokens = prompts[:n_prompts], times * args.tokens
        params = SamplingParams(max_new_tokens=tokens, use_tools=False)
        steps[f"plain_{name}"] = lambda s=some, n=samples, t=tokens: [plain.generate(p, n, t) for p in s]
        steps[f"engine_{name}"] = lambda s=some, n=samples, p=params: engine.generate(s, p, n)
        written[name] = n_prompts * samples * tokens
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    seconds = _bench.alternating(steps, args.repeats, warmup=1, clock=clock)
    result = vars(args) | {f"{name}_tok_s": written[name.split("_")[1]] / s for name, s in seconds.items()}
    result |= {f"ratio_{name}": seconds[f"plain_{name}"] / seconds[f"engine_{name}"] for name in LOADS}
    _bench.show(result | {"matmul_gflops": _bench.matmul_rate(args.dtype) / 1e9, "copy_gb_s": _bench.copy_rate() / 1e9})


if __name__ == "__main__":
    main()
