"""How a Redis is reached: one server, a master that Sentinels name, or a Cluster."""

import re
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

from llm4es.errors import ConfigError

__all__ = ["SCHEMES", "open_client"]

SCHEMES = (
    "redis", "rediss", "unix",
    "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster",
)  # fmt: skip
_TIMEOUT_S = 5.0
_REMEDY = (
    "write redis://:PASSWORD@host:port/db, special characters %-encoded; or "
    "redis+sentinel://:PASSWORD@host:port,host:port/MASTER/db, or "
    "redis+cluster://:PASSWORD@host:port,host:port"
)
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")


def open_client(url: str) -> Any:  # noqa: ANN401 - redis-py's clients share methods, but no type
    """Make a client of what a URL names; only a Cluster is connected to, to learn its nodes.

    Hosts are a list where there are Sentinels or nodes of a Cluster, one of which must answer.
    Sentinels of their own password are given it as `?sentinel_password=`. Raises ConfigError, and
    what redis-py raises where a Cluster does not answer. What is wrong with a URL is not told: it
    may be a piece of the password.
    """
    try:
        place = _read(url)
        # Refuses options that it does not know.
        redis.Redis.from_url(place.url).connection_pool.make_connection()
    except (ValueError, TypeError, AttributeError):
        raise _malformed() from None
    waiting: dict[str, Any] = {
        "socket_timeout": _TIMEOUT_S,
        "socket_connect_timeout": _TIMEOUT_S,
    }
    if place.kind == "sentinel":
        return _behind_sentinels(place, waiting)
    if place.kind == "cluster":
        nodes = [ClusterNode(*each) for each in place.hosts]  # type: ignore[no-untyped-call]
        return RedisCluster(url=place.url, startup_nodes=nodes, **waiting)
    return redis.Redis.from_url(place.url, **waiting)


class _Place(NamedTuple):
    kind: str
    url: str  # of the first host, as redis-py reads it
    hosts: list[tuple[str, int]]
    master: str
    sentinel: dict[str, str]  # who we are to Sentinels


def _read(url: str) -> _Place:
    """Take a URL apart. Raises ValueError."""
    scheme, _, rest = url.partition(":")
    if scheme not in SCHEMES:
        raise ValueError
    plain, _, kind = scheme.partition("+")
    parts = urlsplit(f"{plain}:{rest}")
    if "@" in parts.path or "@" in parts.query or parts.fragment:
        raise ValueError
    if not kind:
        if plain != "unix" and not re.fullmatch(r"(/\d*)?", parts.path):
            raise ValueError
        return _Place(kind, url, [], "", {})
    user, at, netloc = parts.netloc.rpartition("@")
    hosts = [_host(each) for each in netloc.split(",")]
    pattern = r"/(?P<master>[^/]+)(?P<db>/\d*)?" if kind == "sentinel" else r"/?(?P<db>)"
    path = re.fullmatch(pattern, parts.path)
    if path is None:
        raise ValueError
    options = parse_qsl(parts.query, strict_parsing=bool(parts.query))
    sentinel = {
        name.removeprefix("sentinel_"): value for name, value in options if _of_sentinel(name)
    }
    if sentinel and kind != "sentinel":
        raise ValueError
    kept = urlencode([each for each in options if not _of_sentinel(each[0])])
    first = f"{plain}://{user}{at}{netloc.split(',')[0]}{path['db'] or ''}"
    return _Place(
        kind,
        f"{first}?{kept}" if kept else first,
        hosts,
        unquote(path.groupdict().get("master") or ""),
        sentinel,
    )


def _of_sentinel(name: str) -> bool:
    return name in _SENTINEL_OPTIONS


def _host(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or not parts.port:
        raise ValueError
    return parts.hostname, parts.port


def _behind_sentinels(place: _Place, waiting: dict[str, Any]) -> Any:  # noqa: ANN401 - see there
    known: dict[str, Any] = parse_url(place.url)  # type: ignore[no-untyped-call]
    for name in ("host", "port"):
        known.pop(name, None)
    encrypted = {name: value for name, value in known.items() if name.startswith("ssl_")}
    if known.pop("connection_class", None) is not None:  # parse_url's word for TLS
        encrypted["ssl"] = known["ssl"] = True
    sentinels: Any = Sentinel  # untyped
    # The next Sentinel is asked at once; waiting for one to return is the worker's.
    at_once = {**waiting, "retry": Retry(NoBackoff(), 0)}
    asked = sentinels(
        place.hosts, sentinel_kwargs={**at_once, **encrypted, **place.sentinel}, **waiting
    )
    return asked.master_for(place.master, **known)


def _malformed() -> ConfigError:
    return ConfigError("window_store", "is no Redis URL", _REMEDY)
