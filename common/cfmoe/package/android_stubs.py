"""A library of Android's public API for compilers, made from its signatures (api/current.txt): classes and members without code.

The file is that of the Android framework's sources, signature format 2.0. Java's own packages are in it, so that code compiled
against this library alone can call nothing that the phone lacks.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cfmoe.errors import CFMoEError, os_error
from cfmoe.package import class_file as jvm

_PRIMITIVES = {
    "boolean": "Z", "byte": "B", "char": "C", "double": "D", "float": "F", "int": "I", "long": "J", "short": "S", "void": "V",
}  # fmt: skip
_ACCESS = {
    "public": jvm.PUBLIC, "protected": jvm.PROTECTED, "private": jvm.PRIVATE, "static": jvm.STATIC, "final": jvm.FINAL,
    "abstract": jvm.ABSTRACT, "default": 0, "synchronized": 0, "native": 0, "transient": 0, "volatile": 0, "deprecated": 0, "strictfp": 0,
}  # fmt: skip
_NULLNESS = {"NonNull": "Landroid/annotation/NonNull;", "Nullable": "Landroid/annotation/Nullable;"}
_KINDS = ("class", "interface", "@interface", "enum")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)")
_PLAIN_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0"}
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass
class _Declaration:
    """A class as the file says it, before names are resolved."""

    package: str
    name: str  # Outer.Inner
    kind: str
    modifiers: list[str]
    parameters: str  # <T extends …>
    extends: list[str]
    implements: list[str]
    deprecated: bool
    members: list[tuple[int, str]] = field(default_factory=list)  # line number, text

    @property
    def dotted(self) -> str:
        return f"{self.package}.{self.name}"

    @property
    def binary(self) -> str:
        return f"{self.package}.".replace(".", "/") + self.name.replace(".", "$")


def write_stubs(signatures: Path, out: Path) -> int:
    """Writes the jar `out` from the signature file and returns the number of classes in it.

    Raises CFMoEError where the file cannot be read or a line of it is not understood.
    """
    try:
        lines = signatures.read_text("utf-8").splitlines()
    except OSError as error:
        raise os_error(error, signatures, "read") from error
    except UnicodeDecodeError as error:
        raise CFMoEError(f"{signatures} is not UTF-8; fetch it again") from error
    names, declarations = _Names(), []
    try:
        for declaration in _declarations(lines):
            names.add(declaration)
            declarations.append(declaration)
        files = {declaration.binary: _class(declaration, names).encode(names.nested) for declaration in declarations}
    except _Malformed as error:
        raise CFMoEError(f"{signatures}: {error}; it is not an API signature file of format 2.0: fetch it again") from error
    if "java/lang/Object" not in files or "android/app/Activity" not in files:
        raise CFMoEError(f"{signatures} lacks java.lang.Object or android.app.Activity: it is not api/current.txt; fetch it again")
    temporary = out.with_name(f".{out.name}.new")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as jar:
            for name in sorted(files):
                jar.writestr(zipfile.ZipInfo(f"{name}.class", _EPOCH), files[name], zipfile.ZIP_DEFLATED)
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise os_error(error, out, "write") from error
    return len(files)


class _Malformed(Exception):
    """A line that is not understood."""


class _Names:
    """Dotted names of all classes, and what InnerClasses says of the nested ones."""

    def __init__(self) -> None:
        self._binary: dict[str, str] = {}
        self._nested: dict[str, jvm.Nested] = {}
        self._members: dict[str, list[str]] = {}

    def add(self, declaration: _Declaration) -> None:
        self._binary[declaration.dotted] = declaration.binary
        if "." in declaration.name:
            outer, _, name = declaration.binary.rpartition("$")
            access = _class_access(declaration, nested=True)
            self._nested[declaration.binary] = jvm.Nested(declaration.binary, outer, name, access)
            self._members.setdefault(outer, []).append(declaration.binary)

    def nested(self, binary: str) -> jvm.Nested | None:
        return self._nested.get(binary)

    def members(self, binary: str) -> list[str]:
        return self._members.get(binary, [])

    def resolve(self, dotted: str) -> str:
        """The binary name of a class; one that is not in the file is taken for what its capitals say."""
        if dotted in self._binary:
            return self._binary[dotted]
        if "." not in dotted:
            return f"java/lang/{dotted}"
        head, *rest = re.split(r"\.(?=[A-Z])", dotted)
        return "/".join([head.replace(".", "/"), "$".join(rest)])


def _declarations(lines: list[str]) -> Iterator[_Declaration]:
    package, current = "", None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("//"):
            continue
        if match := re.fullmatch(r"package (?:@\S+ )*([\w.]+) \{", text):
            package = match[1]
        elif text == "}":
            if current is not None:
                yield current
            current = None
        elif text.endswith("{"):
            current = _declaration(package, _Scanner(text[:-1], number))
        elif current is not None:
            current.members.append((number, text))
        else:
            raise _Malformed(f"line {number} is outside of a class: {text[:80]}")


class _Scanner:
    """A cursor in one line."""

    def __init__(self, text: str, line: int) -> None:
        self.text, self.line, self.at = text, line, 0

    def fail(self, what: str) -> _Malformed:
        return _Malformed(f"line {self.line}: {what} expected at {self.text[self.at : self.at + 40]!r}")

    def space(self) -> None:
        while self.text.startswith(" ", self.at):
            self.at += 1

    def take(self, token: str) -> bool:
        self.space()
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise self.fail(repr(token))

    def word(self) -> str:
        self.space()
        match = re.compile(r"@?[\w.$]*\w").match(self.text, self.at)
        if match is None:
            raise self.fail("a name")
        self.at = match.end()
        return match[0]

    def annotations(self) -> list[str]:
        """Names of the annotations here, without their arguments; @interface is none."""
        found = []
        self.space()
        while self.text.startswith("@", self.at) and not self.text.startswith("@interface", self.at):
            found.append(self.word()[1:])
            if self.text.startswith("(", self.at):
                self.balanced("(", ")")
            self.space()
        return found

    def balanced(self, opening: str, closing: str) -> str:
        """What stands here from `opening` to its partner; quoted text is skipped."""
        start, depth, quoted = self.at, 0, False
        while self.at < len(self.text):
            char = self.text[self.at]
            self.at += 1
            if char == '"' and self.text[self.at - 2] != "\\":
                quoted = not quoted
            elif not quoted and char in (opening, closing):
                depth += 1 if char == opening else -1
                if depth == 0:
                    return self.text[start : self.at]
        raise self.fail(repr(closing))

    def type_text(self) -> str:
        """A type as written: name, arguments, [] and … ."""
        self.annotations()
        text = self.word()
        while self.at < len(self.text):
            if self.text.startswith("<", self.at):
                text += self.balanced("<", ">")
            elif self.text.startswith("[]", self.at):
                text, self.at = text + "[]", self.at + 2
            elif self.text.startswith("...", self.at):
                text, self.at = text + "...", self.at + 3
            elif self.text.startswith(".", self.at):  # a class inside a generic one
                self.at += 1
                text += "." + self.word()
            else:
                break
        return text


def _declaration(package: str, scan: _Scanner) -> _Declaration:
    annotations, modifiers = scan.annotations(), []
    while (word := scan.word()) not in _KINDS:
        if word not in _ACCESS:
            raise _Malformed(f"line {scan.line}: the modifier {word} is unknown")
        modifiers.append(word)
    name = scan.word()
    parameters = scan.balanced("<", ">") if scan.text.startswith("<", scan.at) else ""
    lists: dict[str, list[str]] = {"extends": [], "implements": []}
    target: list[str] | None = None
    scan.space()
    while scan.at < len(scan.text):
        part = scan.type_text()
        if part in lists:
            target = lists[part]
        elif target is None:
            raise _Malformed(f"line {scan.line}: {part} stands behind no extends or implements")
        else:
            target.append(part)
        scan.space()
    deprecated = "Deprecated" in annotations or "deprecated" in modifiers
    return _Declaration(package, name, word, modifiers, parameters, lists["extends"], lists["implements"], deprecated)


def _class_access(declaration: _Declaration, *, nested: bool) -> int:
    access = sum(_ACCESS[word] for word in declaration.modifiers)
    if declaration.kind in ("interface", "@interface"):
        access |= jvm.INTERFACE | jvm.ABSTRACT | (jvm.ANNOTATION if declaration.kind == "@interface" else 0)
    elif declaration.kind == "enum":
        access |= jvm.ENUM | jvm.FINAL | (jvm.STATIC if nested else 0)
    if nested:
        return access
    # The file's own flags know no protected and no static.
    access &= ~(jvm.PROTECTED | jvm.STATIC)
    return access | jvm.PUBLIC | (0 if access & jvm.INTERFACE else jvm.SUPER)


def _class(declaration: _Declaration, names: _Names) -> jvm.ClassFile:
    types = _Types(names, {})
    formal = types.formal_parameters(declaration.parameters)
    is_interface = declaration.kind in ("interface", "@interface")
    parents = [] if is_interface else declaration.extends
    interfaces = declaration.extends + declaration.implements if is_interface else list(declaration.implements)
    if declaration.kind == "@interface":
        interfaces = ["java.lang.annotation.Annotation"]
    superclass = f"java.lang.Enum<{declaration.dotted}>" if declaration.kind == "enum" else (parents[0] if parents else "java.lang.Object")
    superclass = "" if declaration.binary == "java/lang/Object" else superclass
    signature = ""
    if superclass and (formal or "<" in "".join([superclass, *interfaces])):
        signature = formal + "".join(types.signature(text) for text in [superclass, *interfaces])
    result = jvm.ClassFile(
        name=declaration.binary,
        access=_class_access(declaration, nested=False),
        superclass=types.erased(superclass)[1:-1] if superclass else "",
        interfaces=[types.erased(text)[1:-1] for text in interfaces],
        signature=signature,
        deprecated=declaration.deprecated,
        members=names.members(declaration.binary),
    )
    for number, text in declaration.members:
        scan = _Scanner(text, number)
        kind = scan.word()
        if kind in ("field", "enum_constant"):
            result.fields.append(_field(scan, types, kind))
        elif kind in ("method", "ctor"):
            result.methods.append(_method(scan, types, kind, declaration))
        else:
            raise _Malformed(f"line {number}: a {kind} is unknown")
    _complete(result, declaration)
    return result


def _complete(result: jvm.ClassFile, declaration: _Declaration) -> None:
    """Adds what the file leaves out."""
    present = {(method.name, method.descriptor) for method in result.methods}
    if declaration.kind == "enum":
        array, one = f"()[L{result.name};", f"(Ljava/lang/String;)L{result.name};"
        for name, descriptor in (("values", array), ("valueOf", one)):
            if (name, descriptor) not in present:
                result.methods.append(jvm.Member(name, descriptor, jvm.PUBLIC | jvm.STATIC))
    elif declaration.kind == "class" and not any(method.name == "<init>" for method in result.methods):
        result.methods.append(jvm.Member("<init>", "()V", jvm.PRIVATE))  # else a compiler would invent a public one


def _modifiers(scan: _Scanner) -> tuple[list[str], list[str]]:
    """Annotations and modifiers, in whatever order they stand."""
    annotations = scan.annotations()
    modifiers: list[str] = []
    while True:
        before = scan.at
        word = scan.word() if not scan.text.startswith("<", scan.at) else ""
        if word not in _ACCESS:
            scan.at = before
            return annotations, modifiers
        modifiers.append(word)
        annotations += scan.annotations()
        scan.space()


def _field(scan: _Scanner, types: _Types, kind: str) -> jvm.Member:
    annotations, modifiers = _modifiers(scan)
    text, name = scan.type_text(), scan.word()
    descriptor = types.erased(text)
    constant = _constant(scan.text[scan.at :].strip(), descriptor) if scan.take("=") else None
    access = sum(_ACCESS[word] for word in modifiers) | (jvm.ENUM if kind == "enum_constant" else 0)
    return jvm.Member(
        name, descriptor, access, types.generic(text), "Deprecated" in annotations or "deprecated" in modifiers, constant,
        annotations=_nullness(annotations),
    )  # fmt: skip


def _method(scan: _Scanner, types: _Types, kind: str, declaration: _Declaration) -> jvm.Member:
    annotations, modifiers = _modifiers(scan)
    formal_text = scan.balanced("<", ">") if scan.text.startswith("<", scan.at) else ""
    types = _Types(types.names, dict(types.variables))
    formal = types.formal_parameters(formal_text)
    returned = scan.type_text() if kind == "method" else "void"
    name = scan.word()
    scan.expect("(")
    parameters: list[str] = []
    parameter_annotations: list[list[str]] = []
    while not scan.take(")"):
        parameter_annotations.append(_nullness(scan.annotations()))
        parameters.append(scan.type_text())
        scan.take(",")
    throws = []
    if scan.take("throws"):
        throws.append(types.erased(scan.type_text())[1:-1])
        while scan.take(","):
            throws.append(types.erased(scan.type_text())[1:-1])

    access = sum(_ACCESS[word] for word in modifiers)
    if parameters and parameters[-1].endswith("..."):
        access |= jvm.VARARGS
    if declaration.kind in ("interface", "@interface") and not {"static", "default"} & set(modifiers):
        access |= jvm.ABSTRACT
    generic = formal + "(" + "".join(map(types.signature, parameters)) + ")" + types.signature(returned)
    descriptor = "(" + "".join(map(types.erased, parameters)) + ")" + types.erased(returned)
    signature = generic if generic != descriptor else ""
    if kind == "ctor":
        if "." in declaration.name and declaration.kind == "class" and "static" not in declaration.modifiers:
            outer = declaration.binary.rpartition("$")[0]
            descriptor = f"(L{outer};{descriptor[1:]}"  # what an inner object belongs to
        name = "<init>"
    deprecated = "Deprecated" in annotations or "deprecated" in modifiers
    return jvm.Member(
        name, descriptor, access, signature, deprecated,
        throws=throws, annotations=_nullness(annotations), parameter_annotations=parameter_annotations,
    )  # fmt: skip


def _nullness(annotations: list[str]) -> list[str]:
    return [_NULLNESS[name] for name in annotations if name in _NULLNESS]


class _Types:
    """Translates types, with the type variables in scope and what each erases to."""

    def __init__(self, names: _Names, variables: dict[str, str]) -> None:
        self.names, self.variables = names, variables

    def formal_parameters(self, text: str) -> str:
        """`<T extends A & B, U>` as a signature; its variables come into scope."""
        if not text:
            return ""
        parts = [part.partition(" extends ") for part in _split(text[1:-1], ",")]
        bounds = {name.strip(): _split(bound, "&") or ["java.lang.Object"] for name, _, bound in parts}
        for name in bounds:
            self.variables.setdefault(name, "Ljava/lang/Object;")
        for name, first in reversed(list(bounds.items())):
            self.variables[name] = self.erased(first[0])
        return "<" + "".join(f"{name}:" + ":".join(map(self.signature, each)) for name, each in bounds.items()) + ">"

    def erased(self, text: str) -> str:
        """The descriptor."""
        return self._translate(text, lambda name, _: self.variables.get(name) or f"L{self.names.resolve(name)};")

    def signature(self, text: str) -> str:
        """The generic signature."""

        def leaf(name: str, arguments: list[str]) -> str:
            if name in self.variables:
                return f"T{name};"
            inside = "".join(map(self._argument, arguments))
            return f"L{self.names.resolve(name)}<{inside}>;" if inside else f"L{self.names.resolve(name)};"

        return self._translate(text, leaf)

    def generic(self, text: str) -> str:
        """The signature where it says more than the descriptor."""
        signature = self.signature(text)
        return signature if signature != self.erased(text) else ""

    def _argument(self, text: str) -> str:
        if text == "?":
            return "*"
        for word, sign in (("? extends ", "+"), ("? super ", "-")):
            if text.startswith(word):
                return sign + self.signature(text.removeprefix(word))
        return self.signature(text)

    def _translate(self, text: str, leaf: Callable[[str, list[str]], str]) -> str:
        text, arrays = text.strip(), ""
        while text.endswith(("[]", "...")):
            text, arrays = text.removesuffix("[]").removesuffix("..."), arrays + "["
        if text in _PRIMITIVES:
            return arrays + _PRIMITIVES[text]
        head, _, tail = text.partition("<")
        # Of a class inside a generic one the outer arguments are left away.
        closing = tail.rfind(">")
        inner = tail[closing + 1 :] if tail else ""
        arguments = _split(tail[:closing], ",") if tail and not inner else []
        return arrays + leaf(head + inner, arguments)


def _split(text: str, separator: str) -> list[str]:
    """The parts of `text` between separators that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char == "<") - (char == ">")
        if char == separator and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def _constant(text: str, descriptor: str) -> jvm.Constant:
    """The value behind `=`: up to the semicolon that a comment may follow."""
    if text.startswith('"'):
        raw = text[1 : text.rindex('"')]
        return _ESCAPE.sub(lambda m: chr(int(m[1][1:], 16)) if len(m[1]) == 5 else _PLAIN_ESCAPES.get(m[1], m[1]), raw)
    value = text.partition(";")[0].strip()
    if value in ("true", "false"):
        return value == "true"
    if descriptor in "FD":
        special = {"(0.0f/0.0f)": "nan", "(1.0f/0.0f)": "inf", "(-1.0f/0.0f)": "-inf"}
        return float(special.get(value.replace("0.0/", "0.0f/").replace("1.0/", "1.0f/").replace("/0.0)", "/0.0f)"), value.rstrip("fF")))
    return int(value.rstrip("lL"))
