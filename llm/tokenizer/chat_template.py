"""Chat format as a Jinja template, for Hugging Face tokenizers."""

from collections.abc import Sequence

# Once the tokenizer parses the special tokens in the result, its ids equal those of render_conversation (with
# add_generation_prompt, of render_prompt). It cannot tell a special token typed by a user from a real one, as
# Tokenizer.encode can: so a message that holds one is refused. The parts of a message are joined before the check,
# because two harmless neighbours may form a token.
TEMPLATE = """\
{%- macro check(text) -%}
    {%- for token in SPECIAL_TOKENS -%}
        {%- if token in text -%}
            {{- raise_exception('A message contains ' + token + ', which would forge a turn: remove it.') -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- macro render(content) -%}
    {{- check(content if content is string else content | map(attribute='text') | join) -}}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'python' -%}
                {{- '<|python_start|>' + part['text'] + '<|python_end|>' -}}
            {%- elif part['type'] == 'python_output' -%}
                {{- '<|output_start|>' + part['text'] + '<|output_end|>' -}}
            {%- else -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(system='', turn=0) -%}
{{- '<|bos|>' -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' and loop.first -%}
        {%- set ns.system = render(message['content']) + '\\n\\n' -%}
    {%- elif message['role'] == 'user' and ns.turn % 2 == 0 -%}
        {{- '<|user_start|>' + ns.system + render(message['content']) + '<|user_end|>' -}}
        {%- set ns.system = '' -%}
        {%- set ns.turn = ns.turn + 1 -%}
    {%- elif message['role'] == 'assistant' and ns.turn % 2 == 1 -%}
        {{- '<|assistant_start|>' + render(message['content']) + '<|assistant_end|>' -}}
        {%- set ns.turn = ns.turn + 1 -%}
    {%- else -%}
        {{- raise_exception('Roles must be user, assistant, user, ... after an optional leading system message.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant_start|>' -}}
{%- endif -%}
"""


def chat_template(special_tokens: Sequence[str]) -> str:
    """Return the template for a tokenizer with these special tokens; it raises for a message that contains one."""
    return TEMPLATE.replace("SPECIAL_TOKENS", repr(list(special_tokens)))
