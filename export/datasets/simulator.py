"""Simulate a log of card payments, with logins, chargebacks and labelled fraud.

What is simulated, and why, stands in docs/simulator.md. Times are seconds since the first day's
midnight, UTC, until they are written as ISO 8601.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from export.datasets.population import (
    CATEGORIES,
    DEVICES,
    Customer,
    Lottery,
    Terminal,
    Trip,
    build_city,
    build_customer,
)
from llm4es.errors import ConfigError

__all__ = ["LABEL_SCHEMA", "Simulation", "simulate", "write_simulation"]

LABEL_SCHEMA = pa.schema(
    [
        ("customer_id", pa.string()),
        ("event_id", pa.string()),
        ("event_time", pa.timestamp("us", tz="UTC")),
        ("amount", pa.float64()),
        ("label", pa.int8()),
        ("scenario", pa.string()),
        ("label_available_at", pa.timestamp("us", tz="UTC")),
    ]
)

_MONDAY = date(2026, 1, 5)
_DAY_S = 86_400.0
_FEWEST_CUSTOMERS = 10
_FEWEST_DAYS = 21  # two weeks of a compromised terminal, and something before them

_HABIT_KEPT = 0.8
_LOGIN_BEFORE = 0.45  # share of online payments
_OTHER_DEVICE = 0.03  # share of a customer's own logins
_TYPED_RIGHT = 0.94
_CONTACTLESS_EUR = 50.0  # up to here a chip is seldom put in, from here on mostly

_TAKEN_OVER = 0.12  # share of customers, once each
_AT_NIGHT = 0.5  # share of thieves who pay while their customer sleeps
_GUESSED = 0.65  # share of thieves who fail to log in at first
_NO_LOGIN = 0.4  # share of the others who have the card alone
_TRIED = 0.5  # share of thieves whose first payment is small, to see whether the card works
_CASH_OUT = {"5732": 2.5, "5311": 3.0, "5651": 2.5, "5816": 2.5, "4722": 0.8, "4511": 0.7,
             "5944": 0.7, "5942": 1.0, "5411": 1.0}  # fmt: skip
_CUSTOMERS_PER_COMPROMISED = 30
_COMPROMISED_S = 14 * _DAY_S
_COMPROMISED_SHARE = 0.3  # of the payments there and then
_CHARGED_BACK = 0.85  # of the frauds; the others are found in the books
_UNDISPUTED_S = 14 * _DAY_S  # after this a payment without chargeback has its label

_OFFLINE_TERMINAL = 0.0032  # share of payments in shops that wait for a network
_OVERTAKEN = 0.04  # share of records that the same customer's next overtakes, where it is close
_CLOSE_S = 600.0
_SENT_TWICE = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """Records in the order of the log, and one label per payment in order of event time."""

    events: list[dict[str, Any]]
    labels: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """An event before it has an id."""

    at_s: float
    customer: Customer
    type: str
    amount: float = 0.0
    terminal: Terminal | None = None
    channel: str = ""
    device: str = ""
    success: bool = True
    scenario: str = ""  # '' is the customer's own doing
    known_s: float = math.inf  # when a fraud is charged back


def simulate(
    *, customers: int = 240, days: int = 75, seed: int = 7, start: date = _MONDAY
) -> Simulation:
    """Simulate `days` days of `customers` customers, the same for the same arguments.

    Raises ConfigError for fewer than 10 customers or 21 days.
    """
    for field, value, least in (
        ("customers", customers, _FEWEST_CUSTOMERS),
        ("days", days, _FEWEST_DAYS),
    ):
        if value < least:
            raise ConfigError(field, f"{value} is too few to simulate", f"at least {least}")
    rng = np.random.default_rng([seed, 0])
    city = build_city(customers, rng)
    victims = set(rng.permutation(customers)[: round(_TAKEN_OVER * customers)].tolist())
    drafts: list[_Draft] = []
    for number in range(customers):
        own = np.random.default_rng([seed, 1, number])
        customer = build_customer(number, city, start=start, days=days, rng=own)
        drafts += _life(customer, start=start, days=days, rng=own)
        if number in victims:
            drafts += _takeover(customer, days=days, rng=own)
    drafts = [draft for draft in drafts if 0 <= draft.at_s < days * _DAY_S]
    drafts = _compromise(drafts, count=max(1, customers // _CUSTOMERS_PER_COMPROMISED), rng=rng)
    drafts = _charge_back(drafts, days=days, rng=rng)
    drafts.sort(key=lambda draft: (draft.at_s, draft.customer.id, draft.type))
    midnight = datetime.combine(start, time(), UTC)
    return Simulation(
        events=_records(drafts, midnight, rng),
        labels=[
            _label(f"e{number:07d}", draft, midnight)
            for number, draft in enumerate(drafts)
            if draft.type == "payment"
        ],
    )


def write_simulation(simulation: Simulation, folder: Path) -> None:
    """Write events.jsonl, labels.parquet and schema.yaml into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.jsonl").open("w", encoding="utf-8", newline="\n") as log:
        for event in simulation.events:
            log.write(json.dumps(event, separators=(",", ":")) + "\n")
    table = pa.Table.from_pylist(simulation.labels, schema=LABEL_SCHEMA)
    pq.write_table(table, folder / "labels.parquet")
    schema = files("export.datasets").joinpath("payments.yaml")
    (folder / "schema.yaml").write_bytes(schema.read_bytes())


# A customer's own days


@dataclass(frozen=True, slots=True, kw_only=True)
class _Day:
    number: int
    date: date
    flush: float  # 1 on pay day, a third after three days, then nothing
    trip: Trip | None

    def at(self, hour: float) -> float:
        """Seconds at an hour, which may lie outside 0 to 24: the clock goes round."""
        return (self.number + (hour % 24.0) / 24.0) * _DAY_S


def _life(
    customer: Customer, *, start: date, days: int, rng: np.random.Generator
) -> Iterator[_Draft]:
    for day in _days(customer, start, days):
        yield from _orders(customer, day, rng)
        if day.trip is None:
            yield from _habits(customer, day, rng)
        yield from _spending(customer, day, rng)
        for _ in range(int(rng.poisson(customer.logins_per_day))):
            at_s = day.at(rng.normal(19.0 + customer.clock_shift_h, 3.5))
            yield from _login(customer, at_s, rng)


def _days(customer: Customer, start: date, days: int) -> Iterator[_Day]:
    pay_day = customer.segment.pay_day
    since = (start.day - pay_day) % 30 - 1  # days from pay day to the eve of the first day
    for number in range(days):
        today = start + timedelta(days=number)
        month_ends = (today + timedelta(days=1)).day == 1
        paid = today.day == pay_day or (month_ends and today.day < pay_day)
        since = 0 if paid else since + 1
        trip = next((trip for trip in customer.trips if trip.first <= number <= trip.last), None)
        yield _Day(number=number, date=today, flush=math.exp(-since / 3.0), trip=trip)


def _orders(customer: Customer, day: _Day, rng: np.random.Generator) -> Iterator[_Draft]:
    for order in customer.orders:
        if day.date.day == order.day_of_month:
            category = CATEGORIES[order.terminal.category]
            at_s = day.at(rng.normal(category.hour, category.hour_spread))
            yield _payment(customer, order.terminal, at_s, order.amount, rng)


def _habits(customer: Customer, day: _Day, rng: np.random.Generator) -> Iterator[_Draft]:
    for habit in customer.habits:
        if day.date.weekday() in habit.weekdays and rng.random() < _HABIT_KEPT:
            at_s = day.at(rng.normal(habit.hour, 0.3))
            amount = habit.amount * float(rng.lognormal(0.0, 0.15))
            yield _payment(customer, habit.terminal, at_s, amount, rng)


def _spending(customer: Customer, day: _Day, rng: np.random.Generator) -> Iterator[_Draft]:
    rate = customer.payments_per_day * customer.segment.weekdays[day.date.weekday()]
    rate *= 0.85 + 0.9 * day.flush + (0.8 if day.trip else 0.0)
    shift_h = customer.clock_shift_h * (0.3 if day.trip else 1.0)
    for _ in range(int(rng.poisson(rate))):
        terminal = _terminal(customer, day.trip, rng)
        category = CATEGORIES[terminal.category]
        amount = category.median_eur * customer.level * float(rng.lognormal(0.0, category.spread))
        at_s = day.at(rng.normal(category.hour + shift_h, category.hour_spread))
        if terminal.online and rng.random() < _LOGIN_BEFORE:
            yield from _login(customer, at_s - float(rng.uniform(20.0, 900.0)), rng)
        yield _payment(customer, terminal, at_s, amount * (1.0 + 0.3 * day.flush), rng)


def _terminal(customer: Customer, trip: Trip | None, rng: np.random.Generator) -> Terminal:
    code = customer.mix.draw(rng)
    category = CATEGORIES[code]
    if rng.random() < customer.online * category.online or code not in customer.tills:
        return customer.shops[code].draw(rng)
    return trip.tills.draw(rng) if trip else customer.tills[code].draw(rng)


def _payment(
    customer: Customer, terminal: Terminal, at_s: float, amount: float, rng: np.random.Generator
) -> _Draft:
    chip = 0.12 if amount < _CONTACTLESS_EUR else 0.85
    in_shop = "chip" if rng.random() < chip else "contactless"
    return _Draft(
        at_s=at_s,
        customer=customer,
        type="payment",
        amount=max(0.5, round(amount, 2)),
        terminal=terminal,
        channel="online" if terminal.online else in_shop,
    )


def _login(customer: Customer, at_s: float, rng: np.random.Generator) -> Iterator[_Draft]:
    """Log in, mistyping now and then, seldom from a device that is not one's own."""
    device = customer.devices.draw(rng)
    if rng.random() < _OTHER_DEVICE:
        device = DEVICES[int(rng.integers(len(DEVICES)))]
    failures = int(rng.geometric(_TYPED_RIGHT)) - 1
    for again in range(failures, 0, -1):
        yield _Draft(
            at_s=at_s - again * rng.uniform(6.0, 15.0),
            customer=customer,
            type="login",
            device=device,
            success=False,
        )
    yield _Draft(at_s=at_s, customer=customer, type="login", device=device)


# Fraud


def _takeover(customer: Customer, *, days: int, rng: np.random.Generator) -> Iterator[_Draft]:
    """One to three days in which a thief pays beside the customer, in sessions of some minutes."""
    first_day = int(rng.integers(max(7, days // 5), days - 3))
    hour = float(rng.uniform(0.0, 24.0))
    if rng.random() < _AT_NIGHT:
        hour = 4.0 + customer.clock_shift_h + float(rng.normal(0.0, 2.5))
    payments = int(rng.integers(4, 11))
    sessions = min(payments, int(rng.integers(2, 5)))
    lasts_days = int(rng.integers(1, 4))
    device = DEVICES[int(rng.integers(len(DEVICES)))]
    takings = Lottery.of(
        [
            (code, weight * float(rng.gamma(0.7)) / (0.05 + customer.shares.get(code, 0.0)))
            for code, weight in _CASH_OUT.items()
        ]
    )
    starts = sorted(
        (first_day + int(rng.integers(lasts_days)) + (hour + rng.normal(0.0, 1.5)) % 24 / 24)
        * _DAY_S
        for _ in range(sessions)
    )
    yield from _break_in(customer, starts[0], device, rng)
    for number in range(payments):
        at_s = starts[number % sessions] + float(rng.uniform(60.0, 2400.0))
        yield _theft(customer, at_s, takings.draw(rng), rng, first=number == 0)


def _break_in(
    customer: Customer, at_s: float, device: str, rng: np.random.Generator
) -> Iterator[_Draft]:
    failures = int(rng.integers(1, 5)) if rng.random() < _GUESSED else 0
    if failures == 0 and rng.random() < _NO_LOGIN:
        return
    for again in range(failures, -1, -1):
        yield _Draft(
            at_s=at_s - again * float(rng.uniform(8.0, 60.0)),
            customer=customer,
            type="login",
            device=device,
            success=again == 0,
        )


def _theft(
    customer: Customer, at_s: float, code: str, rng: np.random.Generator, *, first: bool
) -> _Draft:
    """Pay at any shop of a category, above what the customer would; the first may be small."""
    shops = customer.shops[code].options
    terminal = shops[int(rng.integers(len(shops)))]
    amount = CATEGORIES[code].median_eur * customer.level * float(rng.lognormal(0.45, 0.6))
    if first and rng.random() < _TRIED:
        amount *= 0.1
    return replace(_payment(customer, terminal, at_s, amount, rng), scenario="takeover")


def _compromise(drafts: Sequence[_Draft], *, count: int, rng: np.random.Generator) -> list[_Draft]:
    """Let `count` tills go bad for two weeks each, the more customers they have the likelier."""
    pairs = {
        (draft.terminal.id, draft.customer.id): None
        for draft in drafts
        if draft.terminal and not draft.terminal.online
    }
    customers = Counter(terminal for terminal, _ in pairs)
    weights = np.array([n**2 for n in customers.values()])
    bad = rng.choice(list(customers), size=count, replace=False, p=weights / weights.sum())
    last_s = max(draft.at_s for draft in drafts)
    from_s = {str(t): float(rng.uniform(0.1 * last_s, last_s - _COMPROMISED_S)) for t in bad}

    def touched(draft: _Draft) -> _Draft:
        begin = from_s.get(draft.terminal.id, math.inf) if draft.terminal else math.inf
        if draft.scenario or not begin <= draft.at_s < begin + _COMPROMISED_S:
            return draft
        if rng.random() >= _COMPROMISED_SHARE:
            return draft
        amount = round(draft.amount * float(rng.lognormal(0.5, 0.4)), 2)
        return replace(draft, amount=amount, scenario="terminal")

    return [touched(draft) for draft in drafts]


def _charge_back(drafts: Sequence[_Draft], *, days: int, rng: np.random.Generator) -> list[_Draft]:
    """Add the chargebacks, three to seven days after most frauds, as far as the period goes."""
    result = []
    for draft in drafts:
        if not draft.scenario or rng.random() >= _CHARGED_BACK:
            result.append(draft)
            continue
        known_s = draft.at_s + float(rng.uniform(3.0, 7.0)) * _DAY_S
        result.append(replace(draft, known_s=known_s))
        if known_s < days * _DAY_S:
            result.append(replace(draft, at_s=known_s, type="chargeback", channel="", scenario=""))
    return result


# The log


def _records(
    drafts: Sequence[_Draft], midnight: datetime, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Records in the order in which the log got them; drafts are in order of event time."""
    arrivals = [
        draft.at_s + delay for draft, delay in zip(drafts, _delays(drafts, rng), strict=True)
    ]
    entries = [(arrival, number) for number, arrival in enumerate(arrivals)]
    entries += [
        (arrivals[number] + float(rng.uniform(0.2, 30.0)), number)
        for number in np.flatnonzero(rng.random(len(drafts)) < _SENT_TWICE).tolist()
    ]
    entries.sort()
    return [
        _record(f"e{number:07d}", drafts[number], midnight, arrival) for arrival, number in entries
    ]


def _delays(drafts: Sequence[_Draft], rng: np.random.Generator) -> list[float]:
    """Seconds from an event to its arrival: a fraction of one, and minutes for a few."""
    delays: list[float] = (0.05 + rng.exponential(0.4, len(drafts))).tolist()
    next_s: dict[str, float] = {}
    for number in range(len(drafts) - 1, -1, -1):
        draft = drafts[number]
        gap_s = next_s.get(draft.customer.id, math.inf) - draft.at_s
        next_s[draft.customer.id] = draft.at_s
        if gap_s < _CLOSE_S and rng.random() < _OVERTAKEN:
            delays[number] = gap_s + float(rng.uniform(5.0, 120.0))
        elif draft.channel in {"chip", "contactless"} and rng.random() < _OFFLINE_TERMINAL:
            delays[number] = float(rng.uniform(120.0, 900.0))
    return delays


def _record(event_id: str, draft: _Draft, midnight: datetime, arrival_s: float) -> dict[str, Any]:
    record: dict[str, Any] = {
        "event_id": event_id,
        "type": draft.type,
        "customer_id": draft.customer.id,
        "occurred_at": _iso(midnight, draft.at_s),
    }
    if draft.type == "login":
        record |= {"device": draft.device, "success": draft.success}
    elif draft.terminal is not None:
        record |= {"terminal_id": draft.terminal.id, "amount": draft.amount}
    if draft.type == "payment" and draft.terminal is not None:
        record |= {
            "category": draft.terminal.category,
            "channel": draft.channel,
            "country": draft.terminal.country,
            "card_holder": draft.customer.holder,
        }
    return record | {"recorded_at": _iso(midnight, arrival_s)}


def _label(event_id: str, draft: _Draft, midnight: datetime) -> dict[str, Any]:
    known_s = draft.known_s if math.isfinite(draft.known_s) else draft.at_s + _UNDISPUTED_S
    return {
        "customer_id": draft.customer.id,
        "event_id": event_id,
        "event_time": _moment(midnight, draft.at_s),
        "amount": draft.amount,
        "label": int(bool(draft.scenario)),
        "scenario": draft.scenario,
        "label_available_at": _moment(midnight, known_s),
    }


def _moment(midnight: datetime, seconds: float) -> datetime:
    return midnight + timedelta(milliseconds=round(seconds * 1_000))


def _iso(midnight: datetime, seconds: float) -> str:
    return _moment(midnight, seconds).isoformat(timespec="milliseconds").replace("+00:00", "Z")
