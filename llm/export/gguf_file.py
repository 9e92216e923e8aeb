"""GGUF files of `arch=qwen3`, which llama.cpp and programs built on it read (architecture `qwen3`).

The format's metadata keys and tensor names are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The
tokenizer goes in by its merges; llama.cpp cuts text by patterns of its own, which have names: other patterns are
refused, since ids would differ.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

from llm.errors import UserError
from llm.export.number_format import check_range
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.model.lora import merged
from llm.tokenizer.bpe import NAMED_PATTERNS, SPECIAL_TOKENS, Tokenizer
from llm.tokenizer.chat_template import chat_template
from llm.tokenizer.hf_files import hf_tokenizer
from llm.utils.source import pip_install

PARTS = {
    "norm_1": "attn_norm",
    "norm_2": "ffn_norm",
    "attn.c_q": "attn_q",
    "attn.c_k": "attn_k",
    "attn.c_v": "attn_v",
    "attn.c_proj": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "mlp.c_gate": "ffn_gate",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
WHOLE = {"transformer.wte": "token_embd", "final_norm": "output_norm", "lm_head": "output"}


def check_gguf(config: GPTConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError for a model or tokenizer that llama.cpp would compute otherwise, and where gguf is missing."""
    if config.arch != "qwen3" or not config.qk_norm:
        found = f"arch={config.arch}" if config.arch != "qwen3" else "arch.qk_norm=false"
        raise UserError(f"to=gguf: llama.cpp does not know {found}; train with arch=qwen3, or take to=hf")
    if config.rope_factor != 1.0:
        raise UserError("to=gguf: arch.rope_scaling=yarn is scaled otherwise by llama.cpp; take to=hf")
    if tokenizer.pattern not in NAMED_PATTERNS.values():
        raise UserError(
            "to=gguf: llama.cpp does not know the pattern by which this tokenizer cuts text; train the tokenizer with "
            f"stage.pattern={next(iter(NAMED_PATTERNS))}, or take to=hf"
        )
    if find_spec("gguf") is None:
        raise UserError(f"to=gguf needs the package gguf: {pip_install('gguf')}")


def tensor_name(name: str) -> str:
    """Return the name in a GGUF file of a parameter of the network. Raises KeyError for one that has none."""
    module, _, kind = name.rpartition(".")
    if module in WHOLE:
        return f"{WHOLE[module]}.{kind}"
    layer, _, part = module.removeprefix("transformer.h.").partition(".")
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def write_gguf(path: Path, net: GPT, tokenizer: Tokenizer, dtype: str) -> None:
    """Write network and tokenizer. dtype: fp32, fp16 or bf16, of matrices; norms are always fp32."""
    import gguf

    c = net.config
    kinds = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
    kind = gguf.GGMLQuantizationType[kinds[dtype]]
    types = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType[types[dtype]])
    writer.add_context_length(c.seq_len)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.inner)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    add_tokenizer(writer, tokenizer)
    for name, value in merged(net).state_dict().items():
        value = value.detach().to("cpu", torch.float32)
        if name.startswith(("transformer.wte.", "lm_head.")):
            value = value[: c.vocab_size]
        array = value.contiguous().numpy()
        stored = gguf.GGMLQuantizationType.F32
        if array.ndim == 2:
            check_range(name, value, dtype)
            stored = kind
        writer.add_tensor(tensor_name(name), gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, tokenizer: Tokenizer) -> None:
    """Add vocabulary, merges, special tokens and the chat template to a GGUFWriter."""
    import gguf

    content = hf_tokenizer(tokenizer.tokens, tokenizer.pattern, SPECIAL_TOKENS)["model"]
    tokens = [*sorted(content["vocab"], key=content["vocab"].get), *SPECIAL_TOKENS]
    normal = [gguf.TokenType.NORMAL] * len(tokenizer.tokens)
    end = tokenizer.special_id("<|assistant_end|>")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(next(n for n, pattern in NAMED_PATTERNS.items() if pattern == tokenizer.pattern))
    writer.add_token_list(tokens)
    writer.add_token_types(normal + [gguf.TokenType.CONTROL] * len(SPECIAL_TOKENS))
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(True)
    writer.add_chat_template(chat_template(SPECIAL_TOKENS))
