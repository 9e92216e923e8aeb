"""Addresses (https://, s3://, hf://, ...) and what in them may be secret: a password, a key, a signature."""

import re
from collections.abc import Mapping
from typing import Any

LONGEST = 2_048  # characters of an address; longer words are no address, and would cost time without end
ENDLESS = re.compile(rf"\S{{{LONGEST + 1},}}")
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,40}://")
# `user:password@`. A password may hold slashes, but `host:8080/a@b` is a port and a path.
USER = re.compile(r"(://)(?:[^/\s'\"?#]*|[^/\s'\"?#:@]*:(?!\d+/)[^\s'\"?#@]*)@")
END = r"(?=[).,:;\]}]*(?:[\s'\"<>]|$))"  # of an address in a sentence
QUERY = re.compile(rf"(https?://[^?#\s'\"]*)[?#]\S*?{END}", re.IGNORECASE)
KEY = re.compile(rf"(://[^?\s'\"]*)\?[^\s'\"=]*=\S*?{END}")  # elsewhere `?` alone is a wildcard


def without_secrets(value: Any) -> str:
    """Return a value as text, without what may be secret in its addresses.

    Left out are `user:password@`, in addresses of the web all from `?` or `#` on, in others `?name=...`, and of a word
    that is longer than any address all from `://` on.
    """
    text = USER.sub(r"\1", ENDLESS.sub(_beginning, str(value)))
    return KEY.sub(r"\1", QUERY.sub(r"\1", text))


def _beginning(word: re.Match) -> str:
    """Return a long word itself, or what stands before its first `://`."""
    name, mark, _ = word[0].partition("://")
    return f"{name}..." if mark else name


def public(value: Any) -> Any:
    """Return a copy of nested mappings and lists whose texts hold no secrets, see `without_secrets`."""
    if isinstance(value, Mapping):
        return {public(key): public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value
