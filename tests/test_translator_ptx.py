"""What tests/gpusim/inline_ptx.py makes of asm statements, and which it refuses."""
from __future__ import annotations

import re

import pytest

from tests.conftest import needs_compiler
from tests.gpusim import inline_ptx
from tests.gpusim.fake_cupy import CompileException, RawModule

pytestmark = needs_compiler

MALFORMED = {
    "an output without =": ('asm("mov.b32 %0, 1;" : "r"(x));', 'constraint "r" of output %0'),
    "an input with =": ('asm("mov.b32 %0, %1;" : "=r"(x) : "=r"(y));', 'constraint "=r" of input'),
    "an unknown constraint": ('asm("mov.b32 %0, %1;" : "=r"(x) : "q"(y));', 'constraint "q"'),
    "a float for r": ('asm("mov.b32 %0, %1;" : "=r"(x) : "r"(1.0f));',
                      "constraint r: takes 32-bit integers"),
    "64 bits for r": ('asm("mov.b32 %0, %1;" : "=r"(x) : "r"(1ll));', "constraint r: takes 32-bit"),
    "an operand too few": ('asm("mov.b32 %0, %1;" : "=r"(x));', "%1 in the template"),
    "a register that is not declared": ('asm("mov.b32 %0, t;" : "=r"(x));', "nor declared by .reg"),
    "no semicolon": ('asm("mov.b32 %0, 1" : "=r"(x));', "no ; after"),
    "a write to an input": ('asm("mov.b32 %1, %0;" : "=r"(x) : "r"(y));', "const"),
    "an unknown opcode": ('asm("bar.sync 0;");', "ptx_bar_sync"),
    "a float for an integer operand": (
        'asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(x) : "r"(y));', "deleted function"),
    "a load that may move": ('asm("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(y));',
                             "needs asm volatile"),
    "a cp-size that cp.async does not have": (
        'asm volatile("cp.async.cg.shared.global [%0], [%1], 8;" :: "r"(x), "l"(p));', "cp-size"),
    "a size that is no immediate": (
        'asm volatile("cp.async.wait_group %0;" :: "r"(x));', "no matching function"),
    "a 32-bit address of global memory": (
        'asm volatile("st.global.b32 [%0], %0;" :: "r"(x));', "PtxGlobal"),
}


@pytest.mark.parametrize(("statement", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_statement_does_not_compile(statement, message):
    source = f"""#line 1 "mine.cu"
extern "C" __global__ void f(unsigned* p) {{
    unsigned x = 1, y = 2;
    {statement}
    *p = x + y;
}}"""
    with pytest.raises(CompileException, match=r"mine\.cu:3") as caught:
        RawModule(code=source).get_function("f")
    assert re.search(message, str(caught.value)), caught.value


def test_translation_keeps_the_lines():
    text = ('# 7 "a.cu"\nint x;\nasm volatile("nop;"\n  "nop;"\n  :: "n"(N)\n# 30 "a.cu"\n'
            '  : "memory");\nchar c = \'"\'; // 32\nasm("what?");')
    with pytest.raises(inline_ptx.PtxError, match=r"a\.cu:32: error"):
        inline_ptx.translate(text)
    done = inline_ptx.translate(text.rpartition("asm")[0])
    assert done.splitlines()[2:] == [
        "do { const PtxImmediate<(N)> gpusim_0{}; ptx_nop(); ptx_nop(); } while (0)",
        '# 30 "a.cu"', ";", 'char c = \'"\'; // 32']
