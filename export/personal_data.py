"""What looks like personal data: by a field's name, or by its values.

A guess that errs on the side of leaving out. It is a help for whoever writes an event schema, and
no proof that a log holds none.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence

__all__ = ["personal_reason"]

_NAME = (
    r"(first|last|full|sur|given|family|middle|maiden|nick|holder|customer|client|user|account|"
    r"contact|person|patient|member|owner|recipient|sender|payee)_?name"
)
_BY_NAME: Mapping[str, str] = {
    r"e_?mail|(^|_)mail(_|$)": "an e-mail address",
    r"phone|mobile|msisdn|(^|_)tel(_|$)|fax": "a phone number",
    r"iban|(^|_)bic(_|$)": "an account number",
    r"(card|account|acct)_?(no|nr|num|number)|(^|_)c?pan(_|$)|cvv": "a card or account number",
    rf"{_NAME}|^name$|surname|holder$|beneficiary": "a person's name",
    r"address|street|zip|post_?(al|code)": "an address",
    r"(^|_)(lat|lon|lng|latitude|longitude)(_|$)": "a place",
    r"birth|(^|_)dob(_|$)": "a birth date",
    r"ssn|passport|national_id|tax_?id|licen[cs]e_?(no|plate)": "an official number",
    r"(^|_)(inn|snils|nin|vat)(_|$)": "an official number",
    r"(^|_)ip(v[46])?(_|$)|ip_?addr|mac_?addr|imei|imsi": "a device or network address",
    r"password|passwd|secret|token|(^|_)pin(_|$)": "a secret",
    r"(^|_)(gender|sex|age|race|religion|nationality|ethnicity)(_|$)": "a personal attribute",
    r"(^|_)marital": "a personal attribute",
}
_NAMES = tuple((re.compile(pattern), what) for pattern, what in _BY_NAME.items())

_EMAIL = re.compile(r"[^@\s]+@[^@\s]+\.[A-Za-z]{2,}")
_PHONE = re.compile(r"\+?\d[\d\s()./-]{7,18}\d")
_PHONE_MARK = re.compile(r"^\+|[\s()-]")
_IBAN = re.compile(r"[A-Z]{2}\d{2}[A-Z0-9]{11,30}")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_CARD_DIGITS = range(13, 20)
_PHONE_DIGITS = range(9, 16)
_LUHN_WRAP = 9


def personal_reason(name: str, values: Sequence[object]) -> str:
    """Say what a field seems to hold ("an e-mail address"), or "" where nothing gives it away."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    for pattern, what in _NAMES:
        if pattern.search(words):
            return what
    texts = [str(value) for value in values if isinstance(value, str | int) and value is not True]
    if not texts:
        return ""
    for looks, least, what in _BY_VALUE:
        if sum(map(looks, texts)) > least * len(texts):
            return what
    return ""


def _holds_email(text: str) -> bool:
    return _EMAIL.search(text) is not None


def _is_phone(text: str) -> bool:
    digits = sum(map(str.isdigit, text))
    return (
        digits in _PHONE_DIGITS
        and _PHONE.fullmatch(text) is not None
        and _PHONE_MARK.search(text) is not None
        and _DATE.match(text) is None
    )


def _is_card(text: str) -> bool:
    """Whether it passes the check of card numbers (Luhn, ISO/IEC 7812)."""
    digits = text.replace(" ", "").replace("-", "")
    if not digits.isdecimal() or not digits.isascii() or len(digits) not in _CARD_DIGITS:
        return False
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - _LUHN_WRAP if value > _LUHN_WRAP else value
    return total % 10 == 0


def _is_iban(text: str) -> bool:
    """Whether it passes the check of account numbers (ISO 13616: 1 modulo 97)."""
    compact = text.replace(" ", "").upper()
    if _IBAN.fullmatch(compact) is None:
        return False
    return int("".join(str(int(letter, 36)) for letter in compact[4:] + compact[:4])) % 97 == 1


def _is_ip(text: str) -> bool:
    if "." not in text and ":" not in text:
        return False
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


# (test, share of the values above which it holds, what it then is); one number in ten passes the
# card check by chance, a phone number is told from other numbers by how it is written.
_BY_VALUE: tuple[tuple[Callable[[str], bool], float, str], ...] = (
    (_holds_email, 0.01, "e-mail addresses"),
    (_is_iban, 0.2, "account numbers (IBAN)"),
    (_is_card, 0.7, "card numbers"),
    (_is_phone, 0.5, "phone numbers"),
    (_is_ip, 0.5, "network addresses"),
)
