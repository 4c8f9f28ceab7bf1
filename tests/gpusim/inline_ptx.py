"""Inline PTX for g++: an asm statement becomes C++ that calls one function per PTX instruction.

    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");

becomes, on the same line,

    do { const PtxImmediate<(N)> gpusim_0{}; ptx_cp_async_wait_group(gpusim_0); } while (0);

ptx.h defines those functions. Their names hold the whole opcode with its modifiers, and nothing is
left out or guessed: what is not modelled there does not compile here.
"""
from __future__ import annotations

import ast
import re
from collections.abc import Iterator

_LITERAL = r'"(?:[^"\\\n]|\\.)*"'
_CHARACTER = r"'(?:[^'\\\n]|\\.[0-9a-fx]*)'"
_TOKEN = re.compile(rf"{_LITERAL}|{_CHARACTER}|\b(?:asm|__asm__|__asm)\b")
_BRACKET = re.compile(rf"{_LITERAL}|{_CHARACTER}|[()\[\]{{}}:,]")
_HEAD = re.compile(r"\s*((?:(?:volatile|__volatile__)\s*)?)\(")
_TEMPLATE = re.compile(rf"\s*(?:{_LITERAL}\s*)+")
_OPERAND = re.compile(r'\s*"([^"]*)"\s*\((.*)\)\s*', re.DOTALL)
_LINE_MARKER = re.compile(r'^# (\d+) ("[^"\n]*").*\n', re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)

_OPCODE = re.compile(r"(?:@(!?)(\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", re.DOTALL)
_DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(\w+(?:\s*,\s*\w+)*)")
_ADDRESS = re.compile(r"(.*?)(?:\s*([+-])\s*([%\w]+))?", re.DOTALL)
_REGISTERS = {"pred": "bool", "f32": "float", "f64": "double"} | {
    f"{kind}{bits}": f"uint{bits}_t" for kind in "bus" for bits in (16, 32, 64)}
# The compiler may drop, repeat or move an asm that has outputs and is not volatile: fatal for what
# other threads write.
_VOLATILE = ("ld.shared", "ldmatrix", "wgmma")


class PtxError(ValueError):
    """An asm statement that is malformed or not understood; the message names file and line."""


def translate(text: str) -> str:
    """The preprocessed C++ text, its asm statements translated; no line moves."""
    parts, at, search_from = [], 0, 0
    while token := _TOKEN.search(text, search_from):
        search_from = token.end()
        if token[0][0] in "\"'":
            continue
        try:
            head = _HEAD.match(text, token.end())
            if not head:
                raise PtxError("asm is not followed by ( or volatile (")
            end = _closing(text, head.end())
            body = text[head.end():end]
            code = _statement(_LINE_MARKER.sub("", body), bool(head[1]))
        except PtxError as e:
            raise PtxError(f"{_place(text, token.start())}: error: {e}") from None
        parts += [text[at:token.start()], code, _line_ends(text[token.start():end])]
        at = search_from = end + 1
    return "".join([*parts, text[at:]])


def _statement(body: str, volatile: bool) -> str:
    template, *sections = _split(body, ":")
    if not _TEMPLATE.fullmatch(template):
        raise PtxError(f"the template is not made of string literals: {template.strip()}")
    ptx = "".join(ast.literal_eval(literal) for literal in re.findall(_LITERAL, template))
    outputs, inputs, clobbers = ([s for s in _split(section, ",") if s.strip()] for section in
                                 (*sections, "", "", "")[:3])
    for clobber in clobbers:
        if clobber.strip() not in ('"memory"', '"cc"'):
            raise PtxError(f"unknown clobber {clobber.strip()}")
    code, poison = [], []
    for number, operand in enumerate(outputs + inputs):
        declaration, poisoned = _operand(number, operand, number < len(outputs))
        code.append(declaration)
        poison += poisoned
    code += poison
    for opcode, call in _instructions(ptx, len(code) - len(poison)):
        if opcode.startswith(_VOLATILE) and outputs and not volatile:
            raise PtxError(f"{opcode} with outputs needs asm volatile: the compiler may move it "
                           "across a barrier")
        code.append(call)
    return f"do {{ {' '.join(code)} }} while (0)"


def _operand(number: int, text: str, is_output: bool) -> tuple[str, list[str]]:
    """The C++ declaration of an operand, and what fills it with garbage before the instructions."""
    match = _OPERAND.fullmatch(text)
    if not match:
        raise PtxError(f"operand %{number} is not \"constraint\"(expression): {text.strip()}")
    constraint, expression = match[1], match[2]
    name = f"gpusim_{number}"
    pattern = r"(?:=&?|\+&?)([rfhld])" if is_output else r"([rfhldn])"
    letter = re.fullmatch(pattern, constraint)
    if not letter:
        kind = "output" if is_output else "input"
        raise PtxError(f'constraint "{constraint}" of {kind} %{number} is not supported')
    if letter[1] == "n":
        return f"const PtxImmediate<({expression})> {name}{{}};", []
    if not is_output:
        return f"const auto {name} = gpusim_input_{letter[1]}({expression});", []
    declaration = f"auto& {name} = gpusim_output_{letter[1]}({expression});"
    return declaration, [f"gpusim_poison({name});"] if constraint[0] == "=" else []


def _instructions(ptx: str, n_operands: int) -> Iterator[tuple[str, str]]:
    """(opcode, C++) of each instruction, declaration and brace."""
    registers: set[str] = set()
    rest = _COMMENT.sub(" ", ptx).strip()
    while rest:
        if rest[0] in "{};":
            yield "", rest[0]
            rest = rest[1:].lstrip()
            continue
        text, semicolon, rest = rest.partition(";")
        text, rest = " ".join(text.split()), rest.lstrip()
        if not semicolon:
            raise PtxError(f"no ; after {text!r}")
        if declaration := _DECLARATION.fullmatch(text):
            if declaration[1] not in _REGISTERS:
                raise PtxError(f"unknown register type .{declaration[1]}")
            names = re.split(r"\s*,\s*", declaration[2])
            registers.update(names)
            ctype = _REGISTERS[declaration[1]]
            yield "", " ".join(f"{ctype} gpusim_reg_{n}; gpusim_poison(gpusim_reg_{n});"
                               for n in names)
            continue
        match = _OPCODE.fullmatch(text)
        if not match:
            raise PtxError(f"not understood: {text!r}")
        negated, predicate, opcode, operands = match.groups()
        arguments = ", ".join(_argument(o.strip(), registers, n_operands)
                              for o in _split(operands or "", ",") if o.strip())
        # .shared::cta is another spelling of .shared (PTX ISA, State Spaces).
        name = re.sub(r"[.:]+", "_", opcode.replace(".shared::cta", ".shared"))
        call = f"ptx_{name}({arguments});"
        if predicate:
            guard = _argument(predicate, registers, n_operands)
            call = f"if ({negated}{guard}) {call}"
        yield opcode, call


def _argument(operand: str, registers: set[str], n_operands: int) -> str:
    if operand[0] == "{" and operand[-1] == "}":
        items = [_argument(i.strip(), registers, n_operands) for i in _split(operand[1:-1], ",")]
        return f"ptx_vector({', '.join(items)})"
    if operand[0] == "[" and operand[-1] == "]":
        match = _ADDRESS.fullmatch(operand[1:-1].strip())
        assert match
        base = _argument(match[1], registers, n_operands)
        offset = _argument(match[3], registers, n_operands) if match[3] else "PtxImmediate<0>{}"
        return f"ptx_address({base}, {match[2] or '+'}1, {offset})"
    if match := re.fullmatch(r"%(\d+)", operand):
        if int(match[1]) >= n_operands:
            raise PtxError(f"{operand} in the template, but the statement has {n_operands} "
                           "operands")
        return f"gpusim_{match[1]}"
    if match := re.fullmatch(r"%%(\w+)", operand):
        return f"ptx_special_{match[1]}()"
    if re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|[1-9]\d*|0)", operand):
        return f"PtxImmediate<{operand}>{{}}"
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
        return f"gpusim_bits<float>(0x{match[1]}u)"
    if operand in registers:
        return f"gpusim_reg_{operand}"
    raise PtxError(f"operand {operand!r} is not understood, nor declared by .reg")


def _split(text: str, separator: str) -> list[str]:
    """The pieces between separators that lie in no bracket and no literal."""
    pieces, depth, start = [], 0, 0
    for token in _BRACKET.finditer(text):
        if token[0] in "([{":
            depth += 1
        elif token[0] in ")]}":
            depth -= 1
        elif token[0] == separator and depth == 0:
            pieces.append(text[start:token.start()])
            start = token.end()
    return [*pieces, text[start:]]


def _closing(text: str, start: int) -> int:
    """Where the parenthesis closes that opened just before start."""
    depth = 1
    for token in _BRACKET.finditer(text, start):
        depth += (token[0] == "(") - (token[0] == ")")
        if depth == 0:
            return token.start()
    raise PtxError("asm ( is never closed")


def _line_ends(statement: str) -> str:
    """What keeps the lines after a statement where they were."""
    markers = list(_LINE_MARKER.finditer(statement))
    if not markers:
        return "\n" * statement.count("\n")
    last = markers[-1]
    return f"\n# {int(last[1]) + statement.count(chr(10), last.end())} {last[2]}\n"


def _place(text: str, position: int) -> str:
    """file:line by the preprocessor's markers."""
    line, file, start = 1, "?", 0
    for marker in _LINE_MARKER.finditer(text, 0, position):
        line, file, start = int(marker[1]), marker[2].strip('"'), marker.end()
    return f"{file}:{line + text.count(chr(10), start, position)}"
