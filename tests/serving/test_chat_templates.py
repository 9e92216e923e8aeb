"""Chat templates of transformers' tokenizers: messages that they refuse, and requests at one time."""

import pytest

transformers = pytest.importorskip("transformers")

from llm.checkpoint.hf_tokenizer import HFTokenizer  # noqa: E402
from llm.errors import UserError  # noqa: E402
from llm.serving.api.conversation import chat_prompt  # noqa: E402
from llm.serving.errors import ApiError  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
)
QUESTION = [{"role": "user", "content": "Who?"}]


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    """Return a byte tokenizer with a template whose marks are special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>")
    hf.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    hf.chat_template = TEMPLATE
    return HFTokenizer(hf, len(hf))


def test_messages_that_a_template_refuses_are_the_clients_error(tokenizer):
    with pytest.raises(UserError, match="no system role"):
        tokenizer.chat_prompt([{"role": "system", "content": "Be brief."}, *QUESTION])
    with pytest.raises(ApiError) as caught:
        chat_prompt(tokenizer, [{"role": "system", "content": "Be brief."}, *QUESTION], 100, 10, False)
    assert caught.value.status == 400


def test_a_prompt_is_what_transformers_makes_of_it(tokenizer):
    expected = tokenizer.hf.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat_prompt(QUESTION) == expected and expected[0] == expected[-1] >= 256


def test_prompts_made_at_one_time_do_not_disturb_each_other(tokenizer, monkeypatch):
    kind, calls = type(tokenizer.hf), []
    original = kind.__call__

    def noted(*args, **options):
        calls.append(tokenizer._lock.locked())  # a call sets how special tokens are read, for all threads
        return original(*args, **options)

    monkeypatch.setattr(kind, "__call__", noted)
    tokenizer.chat_prompt(QUESTION)
    tokenizer.encode("Who?")
    tokenizer.encode_prompt("Who?")
    assert calls == [True] * 3


def test_half_a_surrogate_pair_is_read_as_an_unknown_character(tokenizer):
    assert tokenizer.encode("a\ud800") == tokenizer.encode_prompt("a\ud800") == tokenizer.encode("a\ufffd")
    asked = [[{"role": "user", "content": text}] for text in ("a\ud800", "a\ufffd")]
    assert tokenizer.chat_prompt(asked[0]) == tokenizer.chat_prompt(asked[1])
