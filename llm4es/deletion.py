"""Deletion: what is left of an entity once its log has said to forget it.

Of a deleted entity two things stay, so that neither a zombie nor a replay brings it back: when it
was deleted (`as_of`), and a keyed hash of its id. Without the key nobody can try ids against it.
"""

from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Final

from llm4es.errors import ConfigError

__all__ = ["HASH_BYTES", "DeletionKey", "Tombstone"]

HASH_BYTES: Final = 16
_FINGERPRINT_BYTES: Final = 8
_SHORTEST: Final = 16
_REMEDY: Final = "make one with `openssl rand -hex 24`, and keep it as long as the stores"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """An entity is deleted, and no row of it at or before `as_of` may ever be served."""

    entity_id: str
    as_of: datetime  # UTC, microseconds


class DeletionKey:
    """Hashes ids of deleted entities. The secret is text of at least 16 characters.

    `fingerprint` (8 bytes) tells keys apart and says nothing of them: stores keep it, and refuse
    another key, under which they would not find what they have deleted. Raises ConfigError.
    """

    def __init__(self, secret: str) -> None:
        if len(secret) < _SHORTEST:
            raise ConfigError("deletion_key", f"is shorter than {_SHORTEST} characters", _REMEDY)
        self._key = blake2b(secret.encode(), digest_size=32, person=b"llm4es delete").digest()
        self.fingerprint = blake2b(
            self._key, digest_size=_FINGERPRINT_BYTES, person=b"llm4es print"
        ).digest()

    def hash(self, entity_id: str) -> bytes:
        """BLAKE2b-128 of an id under the key."""
        return blake2b(entity_id.encode(), digest_size=HASH_BYTES, key=self._key).digest()

    @staticmethod
    def needed() -> ConfigError:
        """What to raise where something is to be deleted, and no key was given."""
        return ConfigError("deletion_key", "is not set, and an entity is to be deleted", _REMEDY)

    @staticmethod
    def refuse_other(found: bytes | None, key: "DeletionKey | None", where: str) -> None:
        """Raise ConfigError where a store knows deletions under a key that this is not."""
        if found is None or (key is not None and key.fingerprint == found):
            return
        problem = "needs the one it was given first" if key is None else "was given another one"
        raise ConfigError(
            "deletion_key",
            f"{where} remembers deleted entities by a key, and {problem}",
            "set LLM4ES_DELETION_KEY to it; a fresh store takes any",
        )
