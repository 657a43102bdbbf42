"""Keys of entities in Feast's encoding, from a template: one join, where Feast builds a message.

The template is cut out of what Feast's own helper gives, and compared with it for several ids when
it is made; an encoding that it does not fit is left to the helper.
"""

import struct
from collections.abc import Callable

__all__ = ["entity_keys"]

_SAMPLES = ("a", "a longer one", "é", "x" * 300)


def entity_keys(helper: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """Give what `helper` gives, without building a message for each id."""
    sample = b"\x00sample\x00"
    made = helper(sample.decode())
    length = struct.pack("<I", len(sample))
    at = made.find(length + sample)
    if at < 0:
        return helper
    head, tail = made[:at], made[at + len(length) + len(sample) :]
    pack = struct.Struct("<I").pack

    def key(entity_id: str) -> bytes:
        encoded = entity_id.encode()
        return head + pack(len(encoded)) + encoded + tail

    return key if all(key(each) == helper(each) for each in _SAMPLES) else helper
