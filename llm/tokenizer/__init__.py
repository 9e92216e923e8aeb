"""Tokenizers and the chat format: text and conversations to token ids and back."""

from llm.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from llm.tokenizer.chat_format import render_conversation, render_prompt

__all__ = ["SPECIAL_TOKENS", "Tokenizer", "render_conversation", "render_prompt"]
