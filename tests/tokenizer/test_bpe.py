"""Tokenizer: training, ids, files, and equality with the Hugging Face form on multilingual text."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT
from processes import run_python

from llm.errors import UserError
from llm.tokenizer.bpe import (
    MAX_WHITESPACE_RUN,
    META_FILE,
    MIN_VOCAB_SIZE,
    RANKS_FILE,
    SPECIAL_TOKENS,
    Tokenizer,
    _fingerprint,
    checked_pattern,
    split_pattern,
    train_tokenizer,
)
from llm.tokenizer.compression import (
    SAMPLE_TEXTS,
    compression_table,
    format_compression_table,
    main,
    named_encoder,
    named_encoders,
)
from llm.tokenizer.hf_files import byte_alphabet, merge_pair
from llm.tokenizer.pretrained import load_pretrained

MULTILINGUAL = [
    "",
    "Hello world! It's SHE'LL they'Ve don't I'd 'tis",
    "1 12 123 1234567890 3.14159 1,000,000 ٣٤٥ ½² Ⅷ",
    "안녕하세요 세계. 오늘은 날씨가 좋네요!",
    "中文字符测试,你好。日本語カタカナ ひらがな",
    "Ünïcödé straße ẞ ﬆ 'ſ 'K naïve e\u0301",
    "العربية हिन्दी ไทย עברית Ελληνικά Русский",
    "👍 👩‍👩‍👧‍👦 🇩🇪 🏴‍☠️ ❤️",
    "   leading\t\ttabs\n\n\n  \r\n \u00a0\u2003\u3000x  ",
    "  \n \n  a   b    ",
    " " * 3000 + "x" + "\n" * 300 + "=" * 301 + "a" * 1001,
    "\x00\x01\x1c\x1f\x85\u2028\u200d\ufeff",
    "def f(x):\n    return x**2  # c\n\tpass\n",
    "<|bos|><|user_start|>not a turn<|assistant_end|>",
]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train([*SAMPLE_TEXTS.values(), *MULTILINGUAL] * 2, 900)


@pytest.fixture(scope="module")
def folder(tok, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tok.save(path)
    return path


def fuzz_texts(n: int) -> list[str]:
    """Random strings over pieces that meet at every kind of boundary of the split pattern, and over all of Unicode."""
    rng = random.Random(0)
    pieces = [
        *"aA \n\r\t1'._-=é中한½\u00a0\u0301\u200dß",
        "  ",
        "23",
        "'s",
        "'LL",
        "...",
        "👍",
        "the",
        "ing",
        " the",
        "aaa",
    ]
    texts = []
    for _ in range(n):
        texts.append("".join(rng.choice(pieces) * rng.choice([1, 1, 1, 2, 3, 7]) for _ in range(rng.randint(1, 30))))
        points = (rng.randrange(rng.choice([0x3000, 0x110000])) for _ in range(rng.randint(1, 20)))
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return texts


def test_special_tokens_follow_the_merges_in_order(tok):
    assert tok.vocab_size == 900
    first = 900 - len(SPECIAL_TOKENS)
    assert [tok.special_id(name) for name in SPECIAL_TOKENS] == list(range(first, 900))
    assert tok.bos_id == tok.special_id("bos") == first
    assert tok.decode([tok.bos_id]) == "<|bos|>"
    with pytest.raises(ValueError, match="system_start"):
        tok.special_id("system_start")


def test_round_trip_and_no_special_parsed_from_text(tok):
    for text in [*MULTILINGUAL, *SAMPLE_TEXTS.values()]:
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert tok.decode_bytes(ids) == text.encode()
        assert max(ids, default=0) < tok.bos_id


def test_batch_equals_single(tok):
    assert tok.encode_batch(MULTILINGUAL, num_threads=2) == [tok.encode(text) for text in MULTILINGUAL]
    assert tok.encode_batch([]) == []
    for text in [*MULTILINGUAL, "", "a <|bos|> \ud800 b", " " * 250_000 + "x"]:
        ids = tok.encode_document(text)
        assert ids.dtype == np.int32 and ids.tolist() == [tok.bos_id, *tok.encode(text)]


def test_numbers_are_split_in_groups_of_at_most_two_digits():
    tok = Tokenizer.train(["1234567 " * 50 + "2024 2024 2024"], 270)
    pieces = [tok.decode([i]) for i in tok.encode("1234567 2024")]
    assert pieces == ["12", "34", "56", "7", " ", "20", "24"]


def test_merges_do_not_cross_words():
    tok = Tokenizer.train(["ab cd\tef! ab cd\tef! " * 9], MIN_VOCAB_SIZE + 6)
    words = {b" ab", b" cd", b"\tef", b"!", b"ab", b"cd", b"ef"}
    assert all(any(token in word for word in words) for token in tok.tokens[256:])


def test_training_is_deterministic():
    texts = list(SAMPLE_TEXTS.values())
    assert Tokenizer.train(texts, 600).fingerprint == Tokenizer.train(texts, 600).fingerprint


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["hello"], MIN_VOCAB_SIZE - 1, r"stage\.vocab_size=264 .* at least 265"),
        (["hello"], 400, r"stage\.vocab_size=400 .* set stage\.vocab_size=269 or less"),
        ([], 300, "empty; check data.path"),
        (["", ""], 300, "empty"),
    ],
)
def test_impossible_vocabularies_are_user_errors(texts, vocab_size, message):
    with pytest.raises(UserError, match=message):
        Tokenizer.train(texts, vocab_size)


def test_error_in_the_documents_reaches_the_caller():
    def documents():
        yield "one document"
        raise UserError("shard.parquet row 7")

    with pytest.raises(UserError, match="row 7"):
        train_tokenizer(documents(), 300, 1000, 100)


def test_documents_are_capped_and_reading_stops_at_max_chars():
    read = []

    def documents():
        for i in range(100):
            read.append(i)
            yield "lantern " * 5 + "zqzqzq" * 1000

    tok = train_tokenizer(documents(), MIN_VOCAB_SIZE + 7, max_chars=3 * 40 + 8, doc_cap=40)
    assert read == [0, 1, 2, 3]
    expected = Tokenizer.train(["lantern " * 5] * 3 + ["lantern "], MIN_VOCAB_SIZE + 7)
    assert tok.fingerprint == expected.fingerprint


def test_token_bytes_count_the_utf8_bytes_of_a_text(tok):
    lengths = tok.token_bytes()
    assert lengths.dtype == np.int32 and lengths.shape == (tok.vocab_size,)
    assert (lengths[-len(SPECIAL_TOKENS) :] == 0).all() and (lengths[:256] == 1).all()
    for text in MULTILINGUAL:  # includes tokens that are no valid UTF-8 by themselves
        assert lengths[tok.encode(text)].sum() == len(text.encode())


def test_long_whitespace_runs_and_lone_surrogates_are_encoded(tok):
    text = "a" + " " * (10 * MAX_WHITESPACE_RUN + 7) + "b" + "\t" * MAX_WHITESPACE_RUN
    assert tok.decode(tok.encode(text)) == text
    assert tok.decode(tok.encode_prompt("<|bos|>" + text)) == "<|bos|>" + text
    assert tok.decode(tok.encode("a\ud83db")) == "a\ufffdb"
    assert Tokenizer.train([text + "\ud83d"], 270).vocab_size == 270


def test_save_and_load(tok, folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {RANKS_FILE, META_FILE, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    loaded = Tokenizer.load(folder)
    assert loaded.fingerprint == tok.fingerprint and loaded.vocab_size == tok.vocab_size
    assert [loaded.encode(t) for t in MULTILINGUAL] == [tok.encode(t) for t in MULTILINGUAL]


def test_fingerprint_depends_on_tokens_and_pattern():
    single = [bytes([i]) for i in range(256)]
    prints = {
        Tokenizer(single).fingerprint,
        Tokenizer(single[::-1]).fingerprint,
        Tokenizer([*single, b"ab"]).fingerprint,
        Tokenizer(single, pattern=r"\p{L}+|\P{L}+").fingerprint,
    }
    assert len(prints) == 4


def _damage_line(path):
    lines = path.read_text().splitlines(keepends=True)
    lines[300] = "%%% 300\n"
    path.write_text("".join(lines))


def _edit_meta(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "no folder": (lambda f: shutil.rmtree(f), META_FILE),
    "no ranks": (lambda f: (f / RANKS_FILE).unlink(), RANKS_FILE),
    "empty ranks": (lambda f: (f / RANKS_FILE).write_text(""), "do not belong together"),
    "cut ranks": (lambda f: (f / RANKS_FILE).write_bytes((f / RANKS_FILE).read_bytes()[:2000]), RANKS_FILE),
    "bad base64": (lambda f: _damage_line(f / RANKS_FILE), "line 301"),
    "binary ranks": (lambda f: (f / RANKS_FILE).write_bytes(b"\x80\x04\x95\xff"), "line 1"),
    "broken json": (lambda f: (f / META_FILE).write_text("{"), META_FILE),
    "json list": (lambda f: (f / META_FILE).write_text("[]"), META_FILE),
    "no pattern": (lambda f: _edit_meta(f / META_FILE, pattern=None), "pattern"),
    "newer format": (lambda f: _edit_meta(f / META_FILE, format_version=2), "format_version 2"),
    "other specials": (lambda f: _edit_meta(f / META_FILE, special_tokens=["<s>"]), "<s>"),
    "other pattern": (lambda f: _edit_meta(f / META_FILE, pattern=r"\s+|\S+"), "do not belong together"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_user_errors(damage, folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    spoil, message = DAMAGES[damage]
    spoil(copy)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(copy)
    assert str(copy) in str(error.value)


def test_unusable_pattern_with_a_matching_fingerprint_is_a_user_error(tok, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    _edit_meta(tmp_path / META_FILE, pattern="(", fingerprint=_fingerprint(tok.tokens, "("))
    with pytest.raises(UserError, match="not a usable tokenizer"):
        Tokenizer.load(tmp_path)


def test_hugging_face_file_gives_the_same_ids(tok, folder):
    tokenizers = pytest.importorskip("tokenizers")
    hf = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert hf.get_vocab_size() == tok.vocab_size
    assert [hf.token_to_id(name) for name in SPECIAL_TOKENS] == [tok.special_id(name) for name in SPECIAL_TOKENS]
    periodic = [unit * n for unit in ("a", "ab", "aab", " ", "\t", "=-", "la", "한") for n in range(1, 40)]
    texts = [text for text in [*MULTILINGUAL, *SAMPLE_TEXTS.values()] if "<|" not in text]
    for text in texts + periodic + fuzz_texts(1500):
        ids = tok.encode(text)
        assert hf.encode(text).ids == ids, repr(text)
        assert hf.decode(ids) == text


def test_merge_pair_rebuilds_the_learnt_merges():
    ranks = {bytes([i]): i for i in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258, b"abcabc": 259}
    assert merge_pair(b"bc", ranks) == (b"b", b"c")
    assert merge_pair(b"abc", ranks) == (b"a", b"bc")
    assert merge_pair(b"abcabc", ranks) == (b"abc", b"abc")
    with pytest.raises(ValueError, match="xyz"):
        merge_pair(b"xyz", ranks | {b"xyz": 260})


def test_byte_alphabet_is_a_bijection_to_printable_characters():
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256 and all(c.isprintable() and not c.isspace() for c in alphabet)
    assert alphabet[ord("A")] == "A" and alphabet[ord(" ")] == "Ġ" and alphabet[ord("\n")] == "Ċ"


def test_compression_table(tok):
    text = "aaaa 한글"
    rows = compression_table(tok, {"t": text, "empty": ""}, {"bytes": lambda s: list(s.encode())})
    n = len(tok.encode(text))
    assert rows[0]["bytes"] == rows[0]["bytes_tokens"] == 11 and rows[0]["tokens"] == n
    assert rows[0]["ratio"] == pytest.approx(11 / n) and rows[0]["bytes_ratio"] == 1
    assert rows[0]["bytes_diff"] == pytest.approx(100 * (11 - n) / 11)
    assert rows[1]["tokens"] == 0
    (half,) = compression_table(tok, {"t": "\ud83d"}, {"bytes": lambda s: list(s.encode())})
    assert half["bytes"] == half["bytes_tokens"] == 3  # U+FFFD
    lines = format_compression_table(rows).splitlines()
    assert len(lines) == 4 and len(set(map(len, lines))) == 1
    assert format_compression_table([]) == ""


def test_compression_command(folder, tmp_path, capsys):
    extra = tmp_path / "mine.txt"
    extra.write_text("a text of my own", encoding="utf-8")
    assert main([str(folder), "--against", str(folder), "--text", str(extra)]) == 0
    out = capsys.readouterr().out
    assert "mine.txt" in out and "korean" in out and "+0.0%" in out
    extra.write_bytes(b"\xff\xfe\xfa")
    assert main([str(folder), "--text", str(extra)]) == 2
    assert main([str(tmp_path / "nothing")]) == 2
    assert "mine.txt" in (err := capsys.readouterr().err) and META_FILE in err
    with pytest.raises(UserError, match="gpt7.*gpt2"):
        named_encoder("gpt7")


def test_saving_needs_neither_transformers_nor_torch(folder):
    code = (
        "import sys; from llm.tokenizer.bpe import Tokenizer; "
        "Tokenizer.load(sys.argv[1]).save(sys.argv[1]); "
        "print(*(m for m in ('torch', 'transformers', 'tokenizers', 'lightning') if m in sys.modules))"
    )
    done = run_python(code, str(folder))
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


# ---- patterns and vocabularies of others ----------------------------------------------------------------------------

SCRIPTS = "Numbers 7 42 365 1024. हिन्दी में लिखा गया। ภาษาไทย العَرَبِيَّة 中文 naïve e\u0301t\u0301\n\n  x_1 = 3.14159  \n"


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_numbers_are_cut_into_groups_of_digits(digits):
    tokenizer = Tokenizer.train(["number 123456 " * 99 + "number 123 " * 99], 271, split_pattern(digits))
    assert max(len(t) for t in tokenizer.tokens if t.strip().isdigit()) == digits
    assert tokenizer.decode(tokenizer.encode(SCRIPTS)) == SCRIPTS


def test_marks_keep_words_of_other_scripts_whole():
    word = " हिन्दी"
    whole, cut = Tokenizer.train([word * 200], 279, split_pattern(marks=True)), Tokenizer.train([word * 200], 270)
    assert len(whole.encode(word)) == 1 and not any("हि".encode() in token for token in cut.tokens)
    assert whole.decode(whole.encode(SCRIPTS)) == SCRIPTS


@pytest.mark.parametrize("pattern", [split_pattern(3), split_pattern(marks=True), r"\p{N}{1,3}+|\p{L}++|\s++$|\s|."])
def test_hugging_face_cuts_by_any_pattern_as_we_do(pattern, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer.train([TEXT * 20 + SCRIPTS * 20], 300, checked_pattern(pattern))
    ours.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (SCRIPTS, TEXT, "1234567 12345\n 99  \n\n\n  ", "a\n  \nb  "):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(", "not a regular expression"),
        (r"\p{L}+", r"leaves out parts of a text, such as \"'\""),
        (r"\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+|[ \t\r\n]+", r"such as '\\x0b'"),  # and no-break spaces
        (r"\s+|[^\s\x{20000}-\x{10FFFF}]+", "such as '\U00020000'"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_named(pattern, problem):
    with pytest.raises(UserError, match=problem):
        checked_pattern(pattern)


def test_a_vocabulary_of_others_gives_their_tokens_and_gets_our_special_ones(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    theirs.train_from_iterator([TEXT * 30 + SCRIPTS * 30], vocab_size=320, special_tokens=["<|endoftext|>"])
    theirs.save(str(tmp_path / "theirs.json"))
    ours = load_pretrained(str(tmp_path / "theirs.json"))
    assert ours.vocab_size == theirs.get_vocab_size() - 1 + 9
    for text in (TEXT, SCRIPTS):
        assert [ours.decode([i]) for i in ours.encode(text)] == [theirs.decode([i]) for i in theirs.encode(text).ids]
    ours.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode(SCRIPTS) == ours.encode(SCRIPTS)


def test_a_vocabulary_of_another_kind_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.BertWordPieceTokenizer()
    words.train_from_iterator([TEXT], vocab_size=300)
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match="only byte-level BPE can be used"):
        load_pretrained(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match="stage.pretrained no_such.*nor a tiktoken encoding"):
        load_pretrained("no_such_encoding")


def test_a_vocabulary_with_a_token_that_no_merge_makes_is_refused(tmp_path, tiny_tokenizer):
    pytest.importorskip("tokenizers")
    tiny_tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["qzqz"] = len(content["model"]["vocab"]) + 20
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="stage.pretrained=.*b'qzqz' cannot be made by merging two.*choose another"):
        load_pretrained(str(path))


def test_tokenizers_of_one_name_have_a_column_each(tmp_path, tok, tiny_tokenizer):
    for name, tokenizer in (("a", tok), ("b", tiny_tokenizer)):
        tokenizer.save(tmp_path / name / "model")
        tokenizer.save(tmp_path / name)
    folders = [str(tmp_path / name / "model") for name in "ab"]
    both = named_encoders([*folders, str(tmp_path / "a")])
    assert list(both) == [*folders, "a"]
    assert [len(encode(TEXT)) for encode in both.values()] == [len(t.encode(TEXT)) for t in (tok, tiny_tokenizer, tok)]
    assert list(named_encoders(folders[:1] * 2)) == ["model"]


def test_the_stage_takes_a_vocabulary_of_others(tmp_path, tiny_tokenizer, tiny_config, capsys):
    from llm.stages.run_stage import run_stage

    tiny_tokenizer.save(tmp_path / "other")
    cfg = tiny_config("tokenizer", f"stage.pretrained={tmp_path / 'other' / 'tokenizer.json'}")
    run_stage(cfg)
    assert f"tokenizer.json's {tiny_tokenizer.vocab_size} tokens" in capsys.readouterr().out
    saved = Tokenizer.load(Path(cfg.paths.runs) / "tiny" / "tokenizer" / "model")
    assert saved.encode(TEXT) == tiny_tokenizer.encode(TEXT)
    with pytest.raises(UserError, match=r"stage.pattern=\(: not a regular expression"):
        run_stage(tiny_config("tokenizer", "stage.pattern='('", "run=odd"))
    assert not (Path(cfg.paths.runs) / "odd").exists()
