"""JVM class files that hold signatures and no code of use: what a compiler needs to know of a library (JVM specification, chapter 4)."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

PUBLIC, PRIVATE, PROTECTED, STATIC, FINAL = 0x0001, 0x0002, 0x0004, 0x0008, 0x0010
SUPER, VARARGS, INTERFACE, ABSTRACT = 0x0020, 0x0080, 0x0200, 0x0400
ANNOTATION, ENUM = 0x2000, 0x4000

_VERSION = 52  # Java 8: default and static methods of interfaces
_MESSAGE = "a stub: the phone has the code"
_NAMES = re.compile(r"L([\w/$]+)[;<]")  # in descriptors and signatures

Constant = bool | int | float | str


@dataclass(frozen=True)
class Nested:
    """One row of InnerClasses. Names are binary: java/util/Map$Entry."""

    inner: str
    outer: str
    name: str
    access: int


@dataclass
class Member:
    """A field or a method. `signature` is the generic form, "" where the descriptor says all."""

    name: str
    descriptor: str
    access: int
    signature: str = ""
    deprecated: bool = False
    constant: Constant | None = None  # of a field
    throws: Sequence[str] = ()
    annotations: Sequence[str] = ()  # descriptors
    parameter_annotations: Sequence[Sequence[str]] = ()


@dataclass
class ClassFile:
    """A class by its binary name, with what `encode` writes of it."""

    name: str
    access: int
    superclass: str
    interfaces: Sequence[str] = ()
    signature: str = ""
    deprecated: bool = False
    fields: list[Member] = field(default_factory=list)
    methods: list[Member] = field(default_factory=list)
    members: Sequence[str] = ()  # nested classes: a compiler looks for them here

    def encode(self, nested: Callable[[str], Nested | None]) -> bytes:
        """The file's bytes. `nested` tells which binary names are nested classes; every one that is mentioned gets its row."""
        pool = _Pool()
        head = struct.pack(">HHH", self.access, pool.class_(self.name), pool.class_(self.superclass) if self.superclass else 0)
        head += struct.pack(f">H{len(self.interfaces)}H", len(self.interfaces), *map(pool.class_, self.interfaces))
        body = _table([_field(pool, member) for member in self.fields])
        body += _table([_method(pool, member) for member in self.methods])
        attributes = _common(pool, self.signature, self.deprecated)
        rows = _nested_rows(pool.mentioned().union(self.members), nested)
        if rows:
            packed = [struct.pack(">HHHH", pool.class_(row.inner), pool.class_(row.outer), pool.utf8(row.name), row.access) for row in rows]
            attributes.append(_attribute(pool, "InnerClasses", _table(packed)))
        body += _table(attributes)
        return struct.pack(">IHH", 0xCAFEBABE, 0, _VERSION) + pool.encode() + head + body


class _Pool:
    """The constant pool; a constant asked for twice is written once."""

    def __init__(self) -> None:
        self._index: dict[bytes, int] = {}
        self._entries: list[bytes] = []
        self._next = 1
        self._texts: dict[str, int] = {}
        self._classes: set[str] = set()

    def _add(self, entry: bytes, width: int = 1) -> int:
        if entry not in self._index:
            self._index[entry] = self._next
            self._entries.append(entry)
            self._next += width
        return self._index[entry]

    def utf8(self, text: str) -> int:
        if text in self._texts:
            return self._texts[text]
        # The JVM's own UTF-8: NUL takes two bytes, characters beyond the 16-bit plane are surrogate pairs.
        if text.isascii() and "\0" not in text:
            raw = text.encode()
        else:
            units = struct.iter_unpack(">H", text.encode("utf-16-be", "surrogatepass"))
            raw = b"".join(chr(unit).encode("utf-8", "surrogatepass") if unit else b"\xc0\x80" for (unit,) in units)
        self._texts[text] = self._add(struct.pack(">BH", 1, len(raw)) + raw)
        return self._texts[text]

    def class_(self, name: str) -> int:
        self._classes.add(name)
        return self._add(struct.pack(">BH", 7, self.utf8(name)))

    def string(self, text: str) -> int:
        return self._add(struct.pack(">BH", 8, self.utf8(text)))

    def constant(self, descriptor: str, value: Constant) -> int:
        if isinstance(value, str):
            return self.string(value)
        if descriptor == "J":
            return self._add(struct.pack(">BQ", 5, int(value) & 0xFFFFFFFFFFFFFFFF), 2)
        if descriptor == "D":
            return self._add(struct.pack(">Bd", 6, value), 2)
        if descriptor == "F":
            return self._add(struct.pack(">Bf", 4, value))
        return self._add(struct.pack(">BI", 3, int(value) & 0xFFFFFFFF))

    def method(self, owner: str, name: str, descriptor: str) -> int:
        both = self._add(struct.pack(">BHH", 12, self.utf8(name), self.utf8(descriptor)))
        return self._add(struct.pack(">BHH", 10, self.class_(owner), both))

    def mentioned(self) -> set[str]:
        """Binary names in class entries, descriptors and signatures (and a few texts that look like one)."""
        return {name for text in self._texts for name in _NAMES.findall(text)} | self._classes

    def encode(self) -> bytes:
        return struct.pack(">H", self._next) + b"".join(self._entries)


def _nested_rows(mentioned: set[str], nested: Callable[[str], Nested | None]) -> list[Nested]:
    rows: dict[str, Nested] = {}
    pending = sorted(mentioned)
    while pending:
        name = pending.pop()
        row = nested(name)
        if row is not None and name not in rows:
            rows[name] = row
            pending.append(row.outer)
    return [rows[name] for name in sorted(rows)]  # an outer class comes before what is in it


def _table(rows: Sequence[bytes]) -> bytes:
    return struct.pack(">H", len(rows)) + b"".join(rows)


def _attribute(pool: _Pool, name: str, content: bytes) -> bytes:
    return struct.pack(">HI", pool.utf8(name), len(content)) + content


def _common(pool: _Pool, signature: str, deprecated: bool) -> list[bytes]:
    attributes = []
    if signature:
        attributes.append(_attribute(pool, "Signature", struct.pack(">H", pool.utf8(signature))))
    if deprecated:
        attributes.append(_attribute(pool, "Deprecated", b""))
    return attributes


def _annotations(pool: _Pool, descriptors: Sequence[str]) -> bytes:
    return _table([struct.pack(">HH", pool.utf8(descriptor), 0) for descriptor in descriptors])


def _member(pool: _Pool, member: Member, attributes: list[bytes]) -> bytes:
    attributes = attributes + _common(pool, member.signature, member.deprecated)
    if member.annotations:
        attributes.append(_attribute(pool, "RuntimeInvisibleAnnotations", _annotations(pool, member.annotations)))
    return struct.pack(">HHH", member.access, pool.utf8(member.name), pool.utf8(member.descriptor)) + _table(attributes)


def _field(pool: _Pool, member: Member) -> bytes:
    attributes = []
    if member.constant is not None:
        index = pool.constant(member.descriptor, member.constant)
        attributes.append(_attribute(pool, "ConstantValue", struct.pack(">H", index)))
    return _member(pool, member, attributes)


def _method(pool: _Pool, member: Member) -> bytes:
    attributes = []
    if not member.access & ABSTRACT:
        # new RuntimeException; dup; ldc_w message; invokespecial <init>; athrow
        error = "java/lang/RuntimeException"
        code = struct.pack(">BHB", 0xBB, pool.class_(error), 0x59) + struct.pack(">BH", 0x13, pool.string(_MESSAGE))
        code += struct.pack(">BHB", 0xB7, pool.method(error, "<init>", "(Ljava/lang/String;)V"), 0xBF)
        locals_ = 1 + 2 * len(member.descriptor)  # more than any parameters take
        attributes.append(_attribute(pool, "Code", struct.pack(">HHI", 3, locals_, len(code)) + code + struct.pack(">HH", 0, 0)))
    if member.throws:
        attributes.append(_attribute(pool, "Exceptions", _table([struct.pack(">H", pool.class_(name)) for name in member.throws])))
    if any(member.parameter_annotations):
        rows = b"".join(_annotations(pool, row) for row in member.parameter_annotations)
        content = struct.pack(">B", len(member.parameter_annotations)) + rows
        attributes.append(_attribute(pool, "RuntimeInvisibleParameterAnnotations", content))
    return _member(pool, member, attributes)
