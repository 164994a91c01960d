"""Ten short tasks whose gold answers come from data inside PyPI packages; the packages' versions are in the Makefile.

| task | gold answers from | licence |
| --- | --- | --- |
| number_en, number_fr | num2words 0.5.14 | LGPL-2.1 |
| plural, past, lemma | the table of lemminflect 0.2.3, which is made from the NIH's SPECIALIST lexicon | MIT |
| country_fr, currency, language_es, date_de | babel 2.18.0 (Unicode CLDR) | BSD-3-Clause; data: Unicode-3.0 |
| code | pycountry 26.2.16 (Debian's iso-codes) | LGPL-2.1 |

The packages are downloaded and used, none of their data is kept here.
"""

import csv
import datetime
import gzip
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Item(NamedTuple):
    """One question. key: what it is about, which is in one split only. The answer follows the prompt and a space."""

    key: str
    prompt: str
    answer: str


def number_en() -> Iterator[Item]:
    return _numbers("en", "English")


def number_fr() -> Iterator[Item]:
    return _numbers("fr", "French")


def plural() -> Iterator[Item]:
    for noun, form, *_ in _inflected("noun"):
        if form != noun:
            yield Item(noun, f"The plural of {noun} is", form)


def past() -> Iterator[Item]:
    for verb, past_tense, *_ in _inflected("verb"):
        yield Item(verb, f"The past tense of {verb} is", past_tense)


def lemma() -> Iterator[Item]:
    for verb, _, _, participle, *_ in _inflected("verb"):
        yield Item(verb, f"The base form of {participle} is", verb)


def country_fr() -> Iterator[Item]:
    for code, english in _countries():
        french = _locale("fr").territories.get(code, english)
        if french != english:  # a name to copy tells nothing
            yield Item(code, f"{english} in French is", french)


def currency() -> Iterator[Item]:
    from babel.numbers import get_currency_name, get_territory_currencies

    for code, english in _countries():
        for money in get_territory_currencies(code)[:1]:
            yield Item(code, f"The currency of {english} is the", get_currency_name(money, locale="en"))


def code() -> Iterator[Item]:
    import pycountry

    for country, english in _countries():
        found = pycountry.countries.get(alpha_2=country)
        if found is not None:
            yield Item(country, f"The three-letter code of {english} is", found.alpha_3)


def language_es() -> Iterator[Item]:
    spanish = _locale("es").languages
    for code, english in _locale("en").languages.items():
        if "_" not in code and code in spanish and spanish[code] != english:
            yield Item(code, f"The {english} language in Spanish is", spanish[code])


def date_de() -> Iterator[Item]:
    from babel.dates import format_date

    for n in range(366):
        day = datetime.date(2024, 1, 1) + datetime.timedelta(days=n)
        german = format_date(day, "d. MMMM", locale="de")
        yield Item(f"{day.month}-{day.day}", f"{format_date(day, 'MMMM d', locale='en')} in German is", german)


TASKS: dict[str, Callable[[], Iterator[Item]]] = {
    function.__name__: function
    for function in (number_en, number_fr, plural, past, lemma, country_fr, currency, code, language_es, date_de)
}


WORDS = ("plural", "past", "lemma")
"""Tasks whose keys are words, of which only the common ones are used: those that are one token."""


def _numbers(language: str, name: str) -> Iterator[Item]:
    from num2words import num2words

    for n in range(1, 1000):
        yield Item(str(n), f"{n} in {name} is", num2words(n, lang=language))


def _inflected(part_of_speech: str) -> Iterator[list[str]]:
    """Rows of lemminflect's table: noun, plural; or verb, past tense, participles, third person. One spelling each.

    The table is read as a file: the package's own functions would load pickled models.
    """
    (package,) = importlib.util.find_spec("lemminflect").submodule_search_locations  # type: ignore[union-attr]
    with gzip.open(Path(package, "resources", "infl_lu.csv.gz"), "rt", encoding="utf-8") as lines:
        for word, kind, *forms in csv.reader(lines):
            row = [word, *(form.partition("/")[0] for form in forms)]
            if kind == part_of_speech and all(form.isascii() and form.islower() for form in row if form):
                if len(word) > 1 and word.isalpha() and forms[0]:
                    yield row


def _countries() -> list[tuple[str, str]]:
    """(code, English name) of the territories that have two letters, without CLDR's groups and test codes."""
    territories = _locale("en").territories
    return [(c, n) for c, n in sorted(territories.items()) if len(c) == 2 and c.isalpha() and c not in _NO_COUNTRY]


_NO_COUNTRY = {"EU", "EZ", "UN", "QO", "XA", "XB", "ZZ"}


def _locale(name: str):  # type: ignore[no-untyped-def]
    from babel import Locale

    return Locale(name)
