"""Numbers as people write them in answers: read whole and exactly, or not at all.

`parse_number` knows 1,234 and 1 234 and 1.234.567; 3,5 and 3.5; 3/4, 3 1/2 and \\frac{3}{4}; 1e6, 1.5 x 10^6 and 2^10;
25 %, $18, 5 km, 5 million; 3:30 and 3:30 pm; 12元, 3万 and 5кг, as other scripts than Latin write them; all in bold, in
\\boxed{} and with a dot behind. An answer with a second number ("12 or 13", "3-4", "1/2/2024") is none, because nobody
could say which of them counts.
"""

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

import regex

MAX_CHARS = 10_000  # of an answer; one that is longer is no number
MAX_EXPONENT = 2_000  # of a power, either way: larger ones would take the memory that they ask for


@dataclass(frozen=True)
class Number:
    """A number that was read. value: the number, or hours, minutes (and seconds) of a time; exact.

    unit: a known unit (`UNITS`), "" for none. bare: whether nothing else stood around it.
    """

    value: tuple[Fraction, ...]
    unit: str = ""
    bare: bool = True


def same_number(a: Number | None, b: Number | None) -> bool:
    """Return whether two answers are the same number; None equals nothing.

    The number decides: 1/2 is 0.5, 18 is $18 and 50 % is 50. Only two known units that differ (km and m) tell answers
    apart.
    """
    if a is None or b is None or a.value != b.value:
        return False
    return a.unit == b.unit or not a.unit or not b.unit


# A line names a unit, and then how else it is written.
_UNITS = """
percent %
dollar $ usd dollars
cent ¢ cents
euro € eur euros
sterling £ gbp
yen ¥ jpy 円 元
₩ 원
₽ руб рублей рубля рубль
₺
₪
₫
฿ บาท
₱
₦
₴ грн
rupee ₹ inr rupees
mm millimeter millimeters millimetre millimetres мм
cm centimeter centimeters centimetre centimetres см
m meter meters metre metres м 米
km kilometer kilometers kilometre kilometres км 公里 千米
inch inches
foot ft feet
yard yd yards
mile mi miles
mg milligram milligrams
g gram grams г 克
kg kilogram kilograms kilo kilos кг 公斤 千克
ounce oz ounces
lb lbs
ton tons tonne tonnes
second s sec secs seconds
minute min mins minutes
hour h hr hrs hours
day days
week weeks
month months
year years
ml milliliter milliliters millilitre millilitres
l L liter liters litre litres
gallon gal gallons
degree ° deg degrees
"""
UNITS = {name: line.split()[0] for line in _UNITS.strip().splitlines() for name in line.split()}
SCALES = {"k": 3, "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# Of other scripts; of Han and Hangul one may stand behind the other (百万).
FURTHER_SCALES = dict(zip("十百千万萬亿億兆십백천만억조", (1, 2, 3, 4, 4, 8, 8, 12, 1, 2, 3, 4, 8, 12), strict=True))
FURTHER_SCALES |= {"тыс": 3, "тысяч": 3, "млн": 6, "миллион": 6, "млрд": 9, "миллиард": 9}
FURTHER_SCALES |= {"ألف": 3, "آلاف": 3, "مليون": 6, "ملايين": 6, "مليار": 9}
FURTHER_SCALES |= {"हज़ार": 3, "हजार": 3, "लाख": 5, "करोड़": 7, "พัน": 3, "หมื่น": 4, "แสน": 5, "ล้าน": 6}
ORDINALS = ("st", "nd", "rd", "th")

_CURRENCIES = "$€£¥₹¢₩₽₺₪₫฿₱₦₴"
_CURRENCY = f"[{_CURRENCIES}]"
_SIGN = r"(?P<sign>[-+]?) ?"
_PLAIN = r"\d{1,3}(?:[ '_]\d{3})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)*|[.,]\d+"
_MIXED = r"(?P<whole>\d+) (?P<part>\d+) ?/ ?(?P<parts>\d+)"
_TIME = r"(?P<time>\d{1,4}(?::\d{1,4}){1,2})"
_POWER = r"(?P<base>\d+) ?(?:\^|\*\*) ?(?P<power>[-+]?\d+)"
_TIMES_TEN = r"(?: ?[*x] ?10 ?(?:\^|\*\*) ?|[eE])(?P<exponent>[-+]?\d+)"
_FRACTION = rf"(?P<upper>{_PLAIN})(?: ?/ ?(?P<lower>{_PLAIN})|{_TIMES_TEN})?"
_LEAD = r"(?P<lead>[^\d=:≈~]*(?:[=:≈~]|\bis\b|(?<!不)是|は))? ?"  # "x =", "Total:", "The answer is"
_NUMBER = re.compile(
    rf"{_LEAD}(?:{_SIGN}(?P<money>{_CURRENCY}) ?|(?P<money_first>{_CURRENCY}) ?{_SIGN.replace('sign', 'sign_behind')}|"
    rf"{_SIGN.replace('sign', 'sign_alone')})(?:{_MIXED}|{_TIME}|{_POWER}|{_FRACTION})"
)
_HALF_OF_DAY = re.compile(r" ?([ap])\.? ?m\b\.?", re.IGNORECASE)
_WORD = re.compile(rf"(?P<gap>[ -]?)(?P<word>[%°{_CURRENCIES}]|[^\W\d_]+(?:\^?[23](?![\d]))?)")
_FACTOR = regex.compile(r"[\p{Latin}\p{Greek}\p{Common}]|\p{Cyrillic}$|[십백천만억조]")  # begins 5M, 2x, 2π
# Not in 千克 (kilogram), 千焦 (kilojoule), 兆瓦 (megawatt), 조각 (piece), тысячелетие (millennium), ألفاظ (terms) and
# พันธุ์ (species).
_FURTHER_SCALE = re.compile(
    " ?(?:([十百万萬亿億]|千(?![克米瓦卡焦帕赫伏])|兆(?![瓦帕赫焦字]))"
    "|([십백천만억조])(?=[십백천만억조원명개]|(?![가-힣]))"
    "|(тыс|тысяч|млн|миллион|млрд|миллиард)(?:[аиу]|ов)?(?!\\w)"
    "|(ألف|آلاف|مليون|ملايين|مليار)(?:ات)?[اًٌٍ]*(?!\\w)|(हज़ार|हजार|लाख|करोड़|พัน(?!ธ)|หมื่น|แสน|ล้าน))"
)
_ENDS = " .,;!。।॥؟۔،؛！；、"  # of an answer
_NO_WORDS = re.compile(r"[\d+*/=^<>±√π∞\\]")  # behind the number, these make another number of it


@lru_cache(1024)  # of one reference there are many answers
def parse_number(text: str) -> Number | None:
    """Return the number that a text is, with a unit or words around it; None where it is no number, or not just one.

    A comma or point between groups of three digits parts thousands where it can only do that: 1,234 is 1234; 3,5 is
    3.5 and 0,123 is 0.123. A single point is always the decimal one: 1.234 is 1.234.
    """
    if len(text) > MAX_CHARS:
        return None
    text = _plain(text)
    found = _NUMBER.match(text)
    if found is None:
        return None
    value = _value(found)
    if value is None:
        return None
    money, rest = found["money"] or found["money_first"], text[found.end() :]
    if half := _HALF_OF_DAY.match(rest):
        value, rest = _on_24_hours(value, half[1].lower()), rest[half.end() :]
        if value is None:
            return None
    read = _read_rest(rest, bool(money))
    if read is None:
        return None
    scale, unit, bare = read
    value = tuple(number * 10**scale for number in value) if scale else value
    return Number(value, UNITS[money] if money else unit, bare and not found["lead"])


def _value(found: re.Match) -> tuple[Fraction, ...] | None:
    """Return the number (or the parts of a time) that a match holds; None for 1/0, 1,23 4 and the like."""
    negative = "-" in (found["sign"], found["sign_behind"], found["sign_alone"])
    if found["time"]:
        parts = tuple(Fraction(part) for part in found["time"].split(":"))
        return None if negative else parts
    if found["whole"]:
        lower = _decimal(found["parts"])
        number = _decimal(found["whole"]) + _decimal(found["part"]) / lower if lower else None
    elif found["base"]:
        base, power = _decimal(found["base"]), Decimal(found["power"])
        small = abs(power) * len(found["base"]) <= MAX_EXPONENT
        number = base ** int(power) if small and (base or power > 0) else None
    else:
        number = _decimal(found["upper"])
        if number is not None and found["lower"]:
            lower = _decimal(found["lower"])
            number = number / lower if lower else None
        elif number is not None and found["exponent"]:
            power = Decimal(found["exponent"])
            number = number * Fraction(10) ** int(power) if abs(power) <= MAX_EXPONENT else None
    if number is None:
        return None
    return (-number if negative else number,)


def _decimal(text: str) -> Fraction | None:
    """Return the value of digits with points, commas and gaps; None where these stand in no order that anybody uses."""
    digits = re.sub(r"[ '_]", "", text)
    commas, points = digits.count(","), digits.count(".")
    if commas and points:
        decimal, group = (",", ".") if digits.rindex(",") > digits.rindex(".") else (".", ",")
        whole, _, rest = digits.rpartition(decimal)
        if decimal in whole or not _grouped(whole, group):
            return None
        digits = f"{whole.replace(group, '')}.{rest}"
    elif commas > 1 or points > 1 or (commas and digits == text and _grouped(digits, ",") and digits[0] != "0"):
        group = "," if commas else "."
        if not _grouped(digits, group):
            return None
        digits = digits.replace(group, "")
    return Fraction(Decimal(digits.replace(",", ".")))


def _grouped(digits: str, group: str) -> bool:
    """Return whether thousands are parted rightly: by threes, or as in India by twos before the last three."""
    mark = re.escape(group)
    return bool(re.fullmatch(rf"\d{{1,3}}(?:{mark}\d{{3}})+|\d{{1,2}}(?:{mark}\d{{2}})+{mark}\d{{3}}", digits))


def _on_24_hours(value: tuple[Fraction, ...], half: str) -> tuple[Fraction, ...] | None:
    """Return the time of day of 3 or 3:30 in a half ("a" or "p") as hours and minutes; None where there is none."""
    hour, rest = value[0], value[1:] or (Fraction(0),)
    if hour.denominator != 1 or not 1 <= hour <= 12:
        return None
    return (hour % 12 + (12 if half == "p" else 0), *rest)


def _read_rest(rest: str, is_money: bool) -> tuple[int, str, bool] | None:
    """Return (power of ten, known unit, whether nothing is left) of what stands behind a number; None if it spoils it.

    A short word without a gap (5M, 2x) could mean anything: it does spoil it, unless it is a unit, or of a script in
    which words stand so (12个, 5кг).
    """
    scale, unit = 0, ""
    while found := _FURTHER_SCALE.match(rest):
        scale, rest = scale + FURTHER_SCALES[found[found.lastindex]], rest[found.end() :]
    while found := _WORD.match(rest):
        word = found["word"].replace("^", "")
        stem, power = (word[:-1], word[-1]) if word[-1] in "23" else (word, "")
        name = UNITS.get(stem, UNITS.get(stem.lower()) if len(stem) > 2 else None)
        attached = not found["gap"]
        if not scale and not power and (len(stem) > 1 or attached) and stem.lower() in SCALES:
            scale = SCALES[stem.lower()]
        elif name and not unit:
            if attached and is_money and stem.isalpha():
                return None
            unit = name + power
            rest = rest[found.end() :]
            break
        elif attached and len(stem) < 3 and stem not in ORDINALS and _FACTOR.match(stem):
            return None
        else:
            break
        rest = rest[found.end() :]
    return None if _NO_WORDS.search(rest) else (scale, unit, not rest.strip(_ENDS))


# ---------------------------------------------------------------------------------------------------------------------
# One spelling for all

_FRAC = re.compile(r"\\[dt]?frac ?(?:\{([^{}]*)\} ?\{([^{}]*)\}|(\d)(\d))")
_WRAPPED = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf|mbox) ?\{([^{}]*)\}")
_SYMBOLS = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([%$#&])"), r"\1"),
    (re.compile(r"\\(?:times|cdot)\b|[×·]"), "*"),
    (re.compile(r"\^ ?(?:\\circ\b|\{ ?\\circ ?\})"), "°"),
    (re.compile(r"\^ ?\{ ?([-+]?\d+) ?\}"), r"^\1"),
    (re.compile(r"\\[()\[\]!]|\\(?:left|right)\b"), ""),
    (re.compile(r"\\[,;: ]|~"), " "),
    (re.compile(r"\$([^$]*)\$"), r"\1"),  # a formula, not money
    (re.compile(r"(?<![\d*])(?<!\d )\*+|(?<!\*)\*+(?![*]| ?\d)"), ""),  # bold, where it is no product
    (re.compile(r"(?<!\d)_+|_+(?!\d)|[`\"“”„«»「」『』]"), ""),
)
_CHARACTERS = str.maketrans("−–—﹣－⁄’٫٬：＝．／％٪＋＄￥￦", "-----/'.,:=./%%+$¥₩")
_WIDE_COMMA = re.compile("，(?P<group>(?=\\d{3}(?!\\d)))?")  # parts thousands, else a list
_SUPERSCRIPTS = re.compile("[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")


def _plain(text: str) -> str:
    """Return an answer with one spelling of signs, digits, spaces, powers and fractions, without marks of layout."""
    text = unicodedata.normalize("NFC", text)
    text = _SUPERSCRIPTS.sub(lambda found: "^" + unicodedata.normalize("NFKC", found[0]), text)
    text = _WIDE_COMMA.sub(lambda found: ", " if found["group"] is None else ",", text.translate(_CHARACTERS))
    text = "".join(map(_character, text))
    for _ in range(3):  # one within another
        text = _WRAPPED.sub(r"\1", _FRAC.sub(lambda f: f" {f[1] or f[3]}/{f[2] or f[4]}", text))
    for pattern, replacement in _SYMBOLS:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _character(sign: str) -> str:
    kind = unicodedata.category(sign) if not sign.isascii() else ""
    if kind == "Nd":
        return str(unicodedata.decimal(sign))
    if kind == "No" and "\u2044" in (fraction := unicodedata.normalize("NFKC", sign)):
        return f" {fraction}".replace("\u2044", "/")  # one half and the like
    return {"Zs": " ", "Cf": ""}.get(kind, sign)  # Cf: marks of direction, joiners, what has no width
