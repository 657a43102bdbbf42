"""Who pays, where, and out of which habits: the still half of the simulator.

Everything here is drawn once, before the first day. Amounts are EUR, places are points of a
square plane of side 1, hours are hours of the day in UTC, days count from 0, the first one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CATEGORIES",
    "DEVICES",
    "HOME",
    "SEGMENTS",
    "Category",
    "City",
    "Customer",
    "Habit",
    "Lottery",
    "Segment",
    "StandingOrder",
    "Terminal",
    "Trip",
    "build_city",
    "build_customer",
]

T = TypeVar("T")

HOME = "DE"
DEVICES = ("android", "iphone", "tablet", "windows", "mac", "linux")
_DEVICE_WEIGHTS = (0.34, 0.26, 0.10, 0.20, 0.07, 0.03)
_ONLINE_COUNTRIES = {HOME: 0.58, "NL": 0.12, "IE": 0.12, "GB": 0.10, "US": 0.08}
_TRIP_COUNTRIES = {"FR": 0.25, "IT": 0.20, "ES": 0.20, "NL": 0.15, "GB": 0.12, "US": 0.08}
_NEARBY = (0.62, 0.28, 0.10)  # how often the nearest, second and third shop is chosen
_MOST_SHOPS = 12  # online, per category: few serve a country
_TERMINALS_ABROAD = 2  # per country and category
_ON_BUSINESS = 0.5  # trips in 30 days from which on they are those of a working week
_FAVOURITE = 0.8  # share of online payments that go to the merchant one always takes
_SYLLABLES = ("ba", "dre", "fi", "ko", "lu", "mar", "nel", "os", "pri", "quo", "tes", "vy", "zan")


@dataclass(frozen=True, slots=True)
class Category:
    """What is sold: the typical amount and hour, and where it is bought."""

    code: str  # merchant category code; its words are in payments.yaml
    median_eur: float
    spread: float  # standard deviation of the amount's logarithm
    hour: float
    hour_spread: float
    online: float  # inclination to buy it online: 0 never, 1 as the customer does, more, always
    per_100_customers: float  # terminals in the plane
    abroad: float = 0.0  # weight on a trip


CATEGORIES: Mapping[str, Category] = {
    category.code: category
    for category in (
        Category("5411", 24.0, 0.60, 17.0, 2.6, 0.3, 8.0, 1.0),  # groceries
        Category("5814", 6.5, 0.35, 10.0, 3.0, 0.0, 7.0, 2.0),  # café
        Category("5812", 29.0, 0.50, 19.0, 2.2, 0.6, 6.0, 4.0),  # restaurant
        Category("5813", 17.0, 0.55, 22.0, 1.8, 0.0, 4.0, 1.0),  # bar
        Category("5541", 52.0, 0.30, 16.0, 3.5, 0.0, 4.0),  # petrol
        Category("4111", 4.0, 0.50, 8.5, 4.0, 1.2, 3.0, 2.0),  # local transport
        Category("5912", 16.0, 0.60, 12.0, 2.8, 0.5, 4.0, 0.5),  # pharmacy
        Category("5651", 48.0, 0.65, 16.5, 3.5, 1.6, 4.0, 0.5),  # clothing
        Category("5732", 85.0, 0.85, 18.5, 3.5, 1.9, 3.0),  # electronics
        Category("5944", 95.0, 0.70, 16.0, 3.0, 1.2, 2.0, 0.2),  # jewellery
        Category("5311", 38.0, 0.75, 19.0, 4.0, 2.2, 3.0, 0.4),  # department store, marketplace
        Category("5942", 19.0, 0.45, 17.5, 3.2, 1.4, 3.0, 0.3),  # books
        Category("7832", 14.0, 0.35, 20.0, 1.6, 0.8, 2.0),  # cinema
        Category("5816", 13.0, 0.70, 20.5, 3.6, 9.0, 0.0),  # digital goods, games
        Category("4722", 170.0, 0.70, 19.0, 3.6, 9.0, 0.0),  # travel agency
        Category("4511", 190.0, 0.60, 14.0, 4.5, 9.0, 0.0, 0.3),  # airline
        Category("7011", 120.0, 0.45, 20.0, 3.0, 0.8, 1.0, 3.0),  # hotel
        Category("6513", 640.0, 0.20, 6.0, 0.2, 9.0, 0.0),  # rent
        Category("4900", 75.0, 0.35, 6.2, 0.2, 9.0, 0.0),  # utilities
        Category("4899", 12.0, 0.30, 6.4, 0.2, 9.0, 0.0),  # streaming subscription
    )
}


@dataclass(frozen=True, slots=True)
class Segment:
    """A way of living that customers share, and vary."""

    name: str
    share: float  # of all customers
    level: float  # factor on every amount
    payments_per_day: float  # on an ordinary day, habits and standing orders aside
    clock_shift_h: float  # how much later than usual the day is lived
    online: float  # mean share of what can be bought online that is
    weekdays: tuple[float, ...]  # activity from Monday to Sunday
    pay_day: int  # of the month
    trips_per_30_days: float
    renting: float  # share that pays rent by card
    mix: Mapping[str, float]  # category code -> weight


_EVEN = (0.9, 0.9, 0.95, 1.0, 1.25, 1.2, 0.8)
_WEEKEND = (0.7, 0.7, 0.8, 0.95, 1.4, 1.6, 0.85)
_MORNINGS = (1.2, 1.2, 1.1, 1.2, 1.2, 0.8, 0.3)
# fmt: off
SEGMENTS: tuple[Segment, ...] = (
    Segment("student", 0.22, 0.55, 0.47, 1.5, 0.45, _WEEKEND, 1, 0.10, 0.6, {
        "5411": 5, "5814": 4, "5812": 1.5, "5813": 3, "4111": 3, "5651": 1.5, "5732": 1,
        "5942": 1.5, "7832": 1, "5816": 2.5, "5311": 2, "4722": 0.3, "4511": 0.2}),
    Segment("family", 0.27, 1.15, 0.52, 0.0, 0.40, _EVEN, 28, 0.08, 0.5, {
        "5411": 9, "5812": 1.5, "5541": 3, "5912": 2, "5651": 2.5, "5732": 1, "5311": 3.5,
        "5942": 1, "7832": 0.7, "5816": 0.8, "4722": 0.4, "5944": 0.2, "5814": 1}),
    Segment("business traveller", 0.13, 1.9, 0.47, 0.5, 0.50, _EVEN, 25, 0.9, 0.4, {
        "5411": 3, "5814": 3, "5812": 4, "5541": 1.5, "4111": 2, "5651": 1.2, "5732": 1.3,
        "4511": 1.8, "7011": 1.2, "4722": 1, "5944": 0.4, "5311": 1.5, "5813": 1}),
    Segment("pensioner", 0.19, 0.75, 0.39, -2.0, 0.12, _MORNINGS, 30, 0.04, 0.5, {
        "5411": 8, "5814": 2, "5812": 1, "5541": 1.2, "5912": 4, "5651": 0.8, "5311": 1,
        "5942": 1, "4111": 1, "5944": 0.2, "4722": 0.4}),
    Segment("night shift", 0.19, 0.9, 0.47, 9.0, 0.55, _EVEN, 15, 0.05, 0.6, {
        "5411": 6, "5814": 3, "5812": 2, "5541": 3, "5912": 1, "5651": 1.5, "5732": 1.8,
        "5816": 2.5, "5311": 3, "5944": 0.2, "4722": 0.3, "4511": 0.2}),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Lottery(Generic[T]):
    """Draws an option by its weight; ten times as fast as numpy's `choice`."""

    options: tuple[T, ...]
    edges: tuple[float, ...]  # cumulated weights, the last one 1

    @classmethod
    def of(cls, weights: Sequence[tuple[T, float]]) -> "Lottery[T]":
        """Build one from (option, weight) pairs; the weights need not sum to 1."""
        sums = np.cumsum([weight for _, weight in weights])
        return cls(tuple(option for option, _ in weights), tuple(sums / sums[-1]))

    def draw(self, rng: np.random.Generator) -> T:
        """One option."""
        ticket = rng.random()
        for option, edge in zip(self.options, self.edges, strict=True):
            if ticket < edge:
                return option
        return self.options[-1]


@dataclass(frozen=True, slots=True)
class Terminal:
    """Where a payment is taken: a till in the plane, one abroad, or an online shop."""

    id: str
    category: str
    country: str
    online: bool
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class City:
    """All terminals, by where they stand and what they sell."""

    tills: Mapping[str, tuple[Terminal, ...]]  # category -> in the plane
    places: Mapping[str, NDArray[np.float64]]  # category -> where its tills are, (tills, 2)
    shops: Mapping[str, tuple[Terminal, ...]]  # category -> online
    abroad: Mapping[str, Lottery[Terminal]]  # country -> what a traveller pays there


@dataclass(frozen=True, slots=True)
class Habit:
    """The same thing at the same place, such as a café at 8 h on Tuesdays."""

    weekdays: frozenset[int]  # 0 is Monday
    hour: float
    terminal: Terminal
    amount: float


@dataclass(frozen=True, slots=True)
class StandingOrder:
    """A fixed amount on a fixed day: rent, power, streaming."""

    day_of_month: int
    terminal: Terminal
    amount: float


@dataclass(frozen=True, slots=True)
class Trip:
    """Days [first, last] spent abroad."""

    first: int
    last: int
    tills: Lottery[Terminal]  # where one pays there, whatever one's mix at home


@dataclass(frozen=True, slots=True, kw_only=True)
class Customer:
    """One customer's own level, tastes, places and habits."""

    id: str
    holder: str  # made up; in no schema
    segment: Segment
    level: float  # factor on a category's median amount
    payments_per_day: float
    clock_shift_h: float
    online: float
    mix: Lottery[str]
    shares: Mapping[str, float]  # category -> share of what `mix` draws
    tills: Mapping[str, Lottery[Terminal]]
    shops: Mapping[str, Lottery[Terminal]]
    devices: Lottery[str]
    logins_per_day: float
    habits: tuple[Habit, ...]
    orders: tuple[StandingOrder, ...]
    trips: tuple[Trip, ...]


def build_city(customers: int, rng: np.random.Generator) -> City:
    """Place terminals, about as many as `customers` keep busy."""
    countries = Lottery.of(tuple(_ONLINE_COUNTRIES.items()))
    serial = iter(rng.permutation(1_000 + 2 * customers))  # so that ids tell nothing

    def terminal(code: str, country: str, *, online: bool) -> Terminal:
        x, y = rng.random(2)
        return Terminal(f"t{next(serial):06d}", code, country, online, float(x), float(y))

    tills = {
        code: tuple(
            terminal(code, HOME, online=False)
            for _ in range(max(3, round(category.per_100_customers * customers / 100)))
        )
        for code, category in CATEGORIES.items()
        if category.per_100_customers
    }
    shops = {
        code: tuple(
            terminal(code, countries.draw(rng), online=True)
            for _ in range(min(max(3, customers // 40), _MOST_SHOPS))
        )
        for code, category in CATEGORIES.items()
        if category.online
    }
    abroad = {
        country: Lottery.of(
            [
                (terminal(code, country, online=False), category.abroad)
                for code, category in CATEGORIES.items()
                if category.abroad
                for _ in range(_TERMINALS_ABROAD)
            ]
        )
        for country in _TRIP_COUNTRIES
    }
    places = {code: np.array([(at.x, at.y) for at in options]) for code, options in tills.items()}
    return City(tills, places, shops, abroad)


def build_customer(
    number: int, city: City, *, start: date, days: int, rng: np.random.Generator
) -> Customer:
    """Draw one customer and what is known of the days ahead (standing orders, trips)."""
    segment = Lottery.of([(segment, segment.share) for segment in SEGMENTS]).draw(rng)
    tastes = [(code, weight * rng.gamma(0.9)) for code, weight in segment.mix.items()]
    total = sum(weight for _, weight in tastes)
    level = segment.level * float(rng.lognormal(0.0, 0.7))
    tills = _nearby(city, rng)
    shops = {code: _favoured(options, rng) for code, options in city.shops.items()}
    clock_shift_h = segment.clock_shift_h + float(rng.normal(0.0, 1.2))
    return Customer(
        id=f"c{number:05d}",
        holder=_made_up_name(rng),
        segment=segment,
        level=level,
        payments_per_day=segment.payments_per_day * float(rng.gamma(6.0) / 6.0),
        clock_shift_h=clock_shift_h,
        online=min(0.9, segment.online * float(rng.gamma(4.0) / 4.0)),
        mix=Lottery.of(tastes),
        shares={code: weight / total for code, weight in tastes},
        tills=tills,
        shops=shops,
        devices=_own_devices(rng),
        logins_per_day=0.09 * float(rng.gamma(1.5) / 1.5),
        habits=tuple(
            _habit(tills, level, clock_shift_h, rng) for _ in range(int(rng.integers(0, 4)))
        ),
        orders=_standing_orders(segment, shops, level, rng),
        trips=_trips(segment, city, start=start, days=days, rng=rng),
    )


def _nearby(city: City, rng: np.random.Generator) -> dict[str, Lottery[Terminal]]:
    home = rng.random(2)
    nearest = {
        code: np.argsort(((places - home) ** 2).sum(axis=1), kind="stable")[: len(_NEARBY)]
        for code, places in city.places.items()
    }
    return {
        code: Lottery.of(
            [(city.tills[code][i], odds) for i, odds in zip(order, _NEARBY, strict=True)]
        )
        for code, order in nearest.items()
    }


def _favoured(options: Sequence[Terminal], rng: np.random.Generator) -> Lottery[Terminal]:
    favourite = int(rng.integers(len(options)))
    other = (1.0 - _FAVOURITE) / (len(options) - 1)
    return Lottery.of(
        [
            (option, _FAVOURITE if index == favourite else other)
            for index, option in enumerate(options)
        ]
    )


def _own_devices(rng: np.random.Generator) -> Lottery[str]:
    weights = zip(DEVICES, _DEVICE_WEIGHTS, strict=True)
    any_device = Lottery.of(list(weights))
    return Lottery.of([(any_device.draw(rng), 0.8), (any_device.draw(rng), 0.2)])


def _habit(
    tills: Mapping[str, Lottery[Terminal]],
    level: float,
    clock_shift_h: float,
    rng: np.random.Generator,
) -> Habit:
    code, hour, factor = (("5814", 8.0, 0.8), ("5411", 10.0, 1.4), ("5812", 12.5, 0.6))[
        int(rng.integers(3))
    ]
    weekdays = rng.choice(7, size=int(rng.integers(1, 3)), replace=False)
    return Habit(
        weekdays=frozenset(int(day) for day in weekdays),
        hour=hour + clock_shift_h,
        terminal=tills[code].draw(rng),
        amount=CATEGORIES[code].median_eur * factor * level,
    )


def _standing_orders(
    segment: Segment,
    shops: Mapping[str, Lottery[Terminal]],
    level: float,
    rng: np.random.Generator,
) -> tuple[StandingOrder, ...]:
    chances = {"6513": segment.renting, "4900": 0.6, "4899": 0.6}
    orders = []
    for code, chance in chances.items():
        if rng.random() < chance:
            category = CATEGORIES[code]
            amount = category.median_eur * math.sqrt(level) * float(rng.lognormal(0, 0.2))
            orders.append(
                StandingOrder(int(rng.integers(1, 29)), shops[code].draw(rng), round(amount, 2))
            )
    return tuple(orders)


def _trips(
    segment: Segment, city: City, *, start: date, days: int, rng: np.random.Generator
) -> tuple[Trip, ...]:
    """Trips start on any day, those of business on a Monday to Wednesday, and may overlap."""
    trips = []
    for _ in range(int(rng.poisson(segment.trips_per_30_days * days / 30))):
        first = int(rng.integers(days))
        if segment.trips_per_30_days > _ON_BUSINESS:
            first = max(0, first - (start + timedelta(first)).weekday() + int(rng.integers(3)))
        country = Lottery.of(tuple(_TRIP_COUNTRIES.items())).draw(rng)
        trips.append(Trip(first, first + int(rng.integers(1, 5)), city.abroad[country]))
    return tuple(trips)


def _made_up_name(rng: np.random.Generator) -> str:
    """Syllables that name no one."""
    words = ("".join(rng.choice(_SYLLABLES, size=size)) for size in (2, 3))
    return " ".join(word.capitalize() for word in words)
