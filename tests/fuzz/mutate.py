"""Mutations of valid bytes and of valid JSON-like values, as hypothesis strategies."""

import copy
from typing import Any, NamedTuple

from hypothesis import strategies as st

HOSTILE_TEXTS = ["", " ", "null", "../x", "/etc/passwd", "~", "$HOME", "a\nb", "a\0b", "\ud800", "\u2028", "x" * 3000]
HOSTILE_NUMBERS = [0, -1, 1, 2, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")]
HOSTILE: list[Any] = [None, True, False, *HOSTILE_NUMBERS, *HOSTILE_TEXTS, [], {}, [[]], [None], {"": None}, [1] * 100]


class Edit(NamedTuple):
    """A change of bytes at a place that is given as a share of the length."""

    kind: str
    place: float
    size: int
    value: bytes


edits = st.lists(
    st.builds(
        Edit,
        st.sampled_from(["flip", "cut", "drop", "insert", "overwrite", "copy"]),
        st.floats(0, 1),
        st.one_of(st.integers(1, 16), st.integers(1, 4096)),
        st.one_of(
            st.binary(min_size=1, max_size=16),
            st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"{}", b"[" * 400, b"\x80", b"\n", b'"']),
        ),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, changes: list[Edit]) -> bytes:
    """Return ``data`` after ``changes``."""
    content = bytearray(data)
    for kind, share, size, value in changes:
        place = min(int(share * len(content)), max(0, len(content) - 1))
        if kind == "flip" and content:
            content[place] ^= 1 << size % 8
        elif kind == "cut":
            del content[place:]
        elif kind == "drop":
            del content[place : place + size]
        elif kind == "insert":
            content[place:place] = value
        elif kind == "overwrite":
            content[place : place + len(value)] = value
        elif kind == "copy":
            content[place:place] = content[max(0, place - size) : place]
    return bytes(content)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside ``value``."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in ((*path, key), *places_in(item, (*path, key)))]


anything = st.one_of(
    st.sampled_from(HOSTILE),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    ),
)


@st.composite
def changed(draw: st.DrawFn, valid: Any, most: int = 3) -> Any:
    """Return a copy of ``valid`` of which one to ``most`` values were replaced, removed, renamed, added or swapped."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, most))):
        places = places_in(value)
        if not places:
            return value
        *path, key = draw(st.sampled_from(places))
        parent = value
        for part in path:
            parent = parent[part]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add", "swap"]))
        if kind == "replace":
            parent[key] = copy.deepcopy(draw(anything))
        elif kind == "remove":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(HOSTILE_TEXTS) | st.text(max_size=8))] = parent.pop(key)
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = copy.deepcopy(draw(anything))
        elif kind == "add":
            parent.insert(key, copy.deepcopy(draw(anything)))
        else:
            other = value
            for part in draw(st.sampled_from(places)):
                if not isinstance(other, (dict, list)) or (isinstance(other, dict) and part not in other):
                    break
                if isinstance(other, list) and (not isinstance(part, int) or part >= len(other)):
                    break
                other = other[part]
            parent[key] = copy.deepcopy(other) if other is not value else None
    return value
