"""Names of weights in the files of a model folder, and how many rows of their padded tables are kept there."""

import torch

from llm.model.config import GPTConfig
from llm.model.lora import is_adapter

# Fathom's name of a part -> its name in Hugging Face's NanoChat.
HF_PARTS = (
    ("transformer.wte.", "model.embed_tokens."),
    ("transformer.h.", "model.layers."),
    (".attn.c_q.", ".self_attn.q_proj."),
    (".attn.c_k.", ".self_attn.k_proj."),
    (".attn.c_v.", ".self_attn.v_proj."),
    (".attn.c_proj.", ".self_attn.o_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
QWEN3_PARTS = (  # and those of Llama
    *HF_PARTS[:-2],
    (".mlp.c_gate.", ".mlp.gate_proj."),
    (".mlp.c_fc.", ".mlp.up_proj."),
    (".mlp.c_proj.", ".mlp.down_proj."),
    (".attn.q_norm.", ".self_attn.q_norm."),
    (".attn.k_norm.", ".self_attn.k_norm."),
    (".norm_1.", ".input_layernorm."),
    (".norm_2.", ".post_attention_layernorm."),
    ("final_norm.", "model.norm."),
)
PARTS = {"classic": HF_PARTS, "qwen3": QWEN3_PARTS}
VOCAB_PARAMS = ("transformer.wte.", "lm_head.", "value_embeds.")  # their first dimension is the padded vocabulary


def file_name(name: str, config: GPTConfig) -> str:
    """Return the name of a parameter in model.safetensors: classic and qwen3 have those of transformers' classes."""
    for ours, theirs in PARTS.get(config.arch, ()):
        name = name.replace(ours, theirs)
    return name


def rows_kept(name: str, weight: torch.Tensor, config: GPTConfig) -> int:
    """Return how many rows of a weight, or of an adapter's matrix, a file holds: of tables those of the vocabulary."""
    is_padded = name.startswith(VOCAB_PARAMS) and not (is_adapter(name) and name.endswith("A"))
    return config.vocab_size if is_padded else len(weight)
