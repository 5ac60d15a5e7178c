"""Where the members of an uncompressed zip archive lie in the file.

Weights are read in place, so this needs offsets, which ``zipfile`` does not give, and a table of contents whose size is
checked before it is read. Format: APPNOTE.TXT 6.3 (PKWARE), sections 4.3.7, 4.3.12, 4.3.14, 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from russet.checkpoints.formats.tensor_source import StoredFile
from russet.errors import CorruptFile

DIRECTORY_LIMIT = 16 << 20  # bytes of the table of contents; that of a full SDXL .ckpt has 0.3 MB
_END = struct.Struct("<4s4H2IH")  # end of central directory
_END64 = struct.Struct("<4sQ2H2I4Q")  # the same for large archives
_LOCATOR = struct.Struct("<4sIQI")  # where the latter is
_ENTRY = struct.Struct("<4s6H3I5H2I")  # one file header of the central directory
_LOCAL = struct.Struct("<4s5H3I2H")  # the header in front of a member's bytes
_FULL = 0xFFFFFFFF  # in a 32-bit field: the value stands in the zip64 extra field


class Member(NamedTuple):
    """One file in the archive, as the table of contents describes it."""

    header: int  # where its local header begins
    size: int
    plain: bool  # neither compressed nor encrypted


def read_directory(file: StoredFile) -> dict[str, Member]:
    """The archive's table of contents.

    Raises:
        CorruptFile: it is missing, damaged or absurdly long.
    """
    start, size = _find_directory(file)
    if size > DIRECTORY_LIMIT or start + size > file.size:
        raise CorruptFile(f"{file.path}: its table of contents cannot be {size} bytes at {start}; it is damaged")
    data = file.read_bytes(start, size)
    members: dict[str, Member] = {}
    at = 0
    while at + _ENTRY.size <= len(data):
        entry = _ENTRY.unpack_from(data, at)
        flags, method, packed, size, name_length, extra_length, note_length, header = (
            *entry[3:5], *entry[8:13], entry[16]
        )  # fmt: skip
        if entry[0] != b"PK\x01\x02":
            raise CorruptFile(f"{file.path}: its table of contents is damaged; download it again")
        at += _ENTRY.size
        name = data[at : at + name_length].decode("utf-8", "replace")
        extra = data[at + name_length : at + name_length + extra_length]
        wide = _wide(extra)
        size = next(wide, size) if size == _FULL else size
        packed = next(wide, packed) if packed == _FULL else packed
        header = next(wide, header) if header == _FULL else header
        members[name] = Member(header, size, method == 0 and packed == size and not flags & 1)
        at += name_length + extra_length + note_length
    return members


def place(file: StoredFile, member: Member) -> tuple[int, int]:
    """Where a member's bytes begin in the file, and how many there are.

    Raises:
        CorruptFile: it is compressed (torch never does), or does not lie in the file.
    """
    if not member.plain:
        raise CorruptFile(f"{file.path} is compressed inside; torch.save never does that, so it is not read")
    local = file.read_bytes(member.header, _LOCAL.size)
    if len(local) < _LOCAL.size or not local.startswith(b"PK\x03\x04"):
        raise CorruptFile(f"{file.path}: a member is not where its table of contents says; it is damaged")
    fields = _LOCAL.unpack(local)
    start = member.header + _LOCAL.size + fields[-2] + fields[-1]
    if start + member.size > file.size:
        raise CorruptFile(f"{file.path} is cut short: a member reaches beyond its end; download it again")
    return start, member.size


def _find_directory(file: StoredFile) -> tuple[int, int]:
    reach = _END.size + 0xFFFF  # a comment may follow
    tail_at = max(0, file.size - reach)
    tail = file.read_bytes(tail_at, reach)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise CorruptFile(f"{file.path} is cut short: its table of contents is missing; download it again")
    size, start = _END.unpack_from(tail, at)[5:7]
    locator_at = tail_at + at - _LOCATOR.size
    if _FULL in (size, start) and locator_at >= 0:
        locator = _LOCATOR.unpack(file.read_bytes(locator_at, _LOCATOR.size))
        end64 = file.read_bytes(locator[2], _END64.size) if locator[2] < file.size else b""
        if locator[0] != b"PK\x06\x07" or len(end64) < _END64.size:
            raise CorruptFile(f"{file.path}: its table of contents cannot be found; it is damaged")
        size, start = _END64.unpack(end64)[8:10]
    return start, size


def _wide(extra: bytes) -> Iterator[int]:
    """The 64-bit values of a zip64 extra field, in their order; nothing where there is none."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            values = extra[at + 4 : at + 4 + length]
            yield from (value for (value,) in struct.iter_unpack("<Q", values[: len(values) // 8 * 8]))
        at += 4 + length
