"""Numbers in answers: read whole, exactly and in every common spelling, or not at all."""

import time
import unicodedata
from fractions import Fraction

import pytest

from tasks.numbers import parse_number, same_number

SAME = [
    ("18", ["$18", "18 $", "**18**", "*18*", "__18__", "18.", "18..", "18.0", "+18", "$18$", r"\$18", r"\boxed{18}"]),
    (
        "18",
        ["x = 18", "Total: 18", "The answer is 18.", "18 apples", "18 apples.", "018", "`18`", "١٨", "１８", "36/2"],
    ),
    ("-5", ["- 5", "−5", "–5", "-$5", "$-5", "-5.0", "$ -5", "−5 °C"]),
    ("1234", ["1,234", "1 234", "1\u00a0234", "1'234", "1_234", "1,234.00", "1.234,0", "1{,}234", r"1\,234"]),
    ("1234567", ["1,234,567", "1.234.567", "12,34,567", "1 234 567", "1.234567e6"]),
    ("3.5", ["3,5", "7/2", "3 1/2", "3½", r"3\frac{1}{2}", r"\dfrac{7}{2}", r"\boxed{\frac{7}{2}}", "35e-1", "3.50"]),
    ("0.123", ["0,123", ".123", "12.3e-2"]),
    ("1.234", ["1234/1000", "1.2340"]),
    (
        "1000000",
        ["1e6", "1E6", "10^6", "10**6", "1 x 10^6", "1×10⁶", r"1 \times 10^{6}", "1 million", "1000k", "10^3 thousand"],
    ),
    ("25%", ["25 %", "25 percent", r"25\%", "25", "25.0%"]),
    ("5 km", ["5km", "5 kilometers", "5", "5 km."]),
    ("5 m²", ["5 m2", "5 m^2", "5"]),
    ("3:30", ["03:30", "3:30 h", "3:30."]),
    ("3:30 pm", ["15:30", "3:30 PM", "3:30 p.m."]),
    ("3 pm", ["3:00 pm", "15:00"]),
    ("90°", ["90", r"90^\circ", "90 degrees"]),
    ("0", ["-0", "0.0", "0/7"]),
    (
        "12",
        ["12元", "12个", "12개", "12人。", "12。", "答案：12", "答案是12", "答えは12です", "x ＝ 12", "「12」", "«12»"],
    ),
    ("12", ["₩12", "₽12", "12₺", "\u200f12\u200f", "\u202b12\u202c", "12\u200b", "12；", "12％"]),
    ("1234", ["１，２３４"]),
    ("5 kg", ["5кг", "5千克"]),
    ("30000", ["3万", "3萬人", "3만원", "30千"]),
    ("5000000", ["5百万", "5 миллионов", "50 लाख", "5ล้าน", "5000 тыс. руб."]),
    ("5000000", ["5 ملايين", "٥ ملايين", "5000 ألفًا", "5000 тысячу", unicodedata.normalize("NFD", "500만")]),
    ("5000000000", ["5 مليار", "500 \u0915\u0930\u094b\u095c", "500 \u0915\u0930\u094b\u0921\u093c"]),
    ("5", ["5千焦", "5兆瓦", "5 ألفاظ"]),
    ("25%", ["٢٥٪"]),
]
DIFFERENT = [
    ("1/2", "1/3"),
    ("1/2", "1"),
    ("3:30", "3:45"),
    ("3:30 am", "3:30 pm"),
    ("1e6", "1"),
    ("5", "5e3"),
    ("3,5", "35"),
    ("2 1/2", "2"),
    ("1.234", "1234"),
    ("50%", "0.5"),
    ("5 km", "5 m"),
    ("5 m²", "5 m"),
    ("5 dollars", "5 euros"),
    ("2**3", "23"),
    ("5 million", "5"),
    ("5 آلاف", "5"),
    ("٢٥٪", "$25"),
    ("10000000000000001", "10000000000000000"),
    ("9" * 5000, "9" * 4999 + "8"),
    ("-5", "5"),
    ("1/3", "0.333333333333333333"),
]
NONE = [
    "",
    "five",
    "12 or 13",
    "3-4",
    "3–4",
    "3 to 4",
    "3, 4",
    "(3,4)",
    "1/2/2024",
    "2024-01-02",
    "1/0",
    "0^-1",
    "2 1/0",
]
NONE += ["3+2=5", "12,34.5", "1,2345,6", "1.23.4", "5 apples and 3 pears", "--5", "x - 5", "n-5", "2x", "2π", r"2\pi"]
NONE += ["3，4", "3、4", "12或13", "3万5千", "答案不是12", "5조각", "2х", "2α", "5µ"]
NONE += ["3h30", "5'3", "13 pm", "5M", "$5m", "1:2:3:4", "5 ± 1", "10^999999999", "1e999999999", "9" * 20_000]


@pytest.mark.parametrize(("number", "spellings"), SAME)
def test_one_number_in_many_spellings(number, spellings):
    for spelling in spellings:
        assert same_number(parse_number(number), parse_number(spelling)), spelling
        assert same_number(parse_number(spelling), parse_number(number)), spelling


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_other_numbers_are_not_the_same(a, b):
    assert parse_number(a) and parse_number(b)
    assert not same_number(parse_number(a), parse_number(b)) and not same_number(parse_number(b), parse_number(a))


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_number_or_more_than_one_is_none(text):
    assert parse_number(text) is None and not same_number(None, None)


def test_numbers_are_exact_and_say_what_stood_around_them():
    assert parse_number("0.1").value == (Fraction(1, 10),) and parse_number("1,5e-2").value == (Fraction(3, 200),)
    assert parse_number("3:05 pm").value == (15, 5)
    assert parse_number("5 km.").unit == "km" and parse_number("$5").unit == "dollar"
    assert parse_number("12。").bare and parse_number("١٢؟").bare and not parse_number("12个").bare
    assert parse_number("5 km.").bare and not parse_number("5 figs").bare and not parse_number("x = 5").bare


@pytest.mark.parametrize("piece", ["1", "1 ", "*", "1,", "$", r"\frac{", "a", "111 ", "^", "is ", "- ", "x=", "1/"])
def test_no_text_takes_long(piece):
    start = time.process_time()
    parse_number(piece * (9_900 // len(piece)))
    assert time.process_time() - start < 1
