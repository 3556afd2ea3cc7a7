"""Thrift's compact protocol, as far as Parquet's headers and footers need it; only read."""

from __future__ import annotations

from typing import Any

_TRUE, _FALSE, _BYTE, _BINARY, _STRUCT = 1, 2, 3, 8, 12
_INTEGERS = (4, 5, 6)  # i16, i32, i64
_LISTS = (9, 10)  # list, set


def read_struct(data: bytes, at: int = 0) -> tuple[dict[int, Any], int]:
    """The fields of a struct by number, and where it ends.

    Raises:
        IndexError, ValueError: that is none, or it goes on behind the data.
    Source: the Thrift specification, thrift-compact-protocol.md.
    """
    fields: dict[int, Any] = {}
    number = 0
    while data[at]:
        kind, delta = data[at] & 15, data[at] >> 4
        at += 1
        if delta:
            number += delta
        else:
            number, at = _zigzag(data, at)
        if kind in (_TRUE, _FALSE):  # the only values that are in the kind
            fields[number] = kind == _TRUE
        else:
            fields[number], at = _value(data, at, kind)
    return fields, at + 1


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number of seven bits a byte, the low ones first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _zigzag(data, at)
    if kind == _BINARY:
        length, at = read_varint(data, at)
        return data[at : at + length], at + length
    if kind == _STRUCT:
        return read_struct(data, at)
    if kind in _LISTS:
        return _list(data, at)
    if kind in (_TRUE, _FALSE, _BYTE):  # a byte each in lists
        return data[at], at + 1
    raise ValueError(f"field of kind {kind}")


def _list(data: bytes, at: int) -> tuple[list[Any], int]:
    length, kind = data[at] >> 4, data[at] & 15
    at += 1
    if length == 15:
        length, at = read_varint(data, at)
    values = []
    for _ in range(length):
        value, at = _value(data, at, kind)
        values.append(value)
    return values, at


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = read_varint(data, at)
    return (value >> 1) ^ -(value & 1), at
