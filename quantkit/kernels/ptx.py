"""All PTX text of the kernels, with its operands' constraints.

Each function returns an ``Assembly`` for ``tl.inline_asm_elementwise``. Its docstring lists the operands $0, $1, … in
order, outputs first, then a semicolon and the inputs. Each use in a kernel has a plain twin beside it, for GPUs without
these instructions and for the interpreter.

"f" is a float32 register, "d" float64, "r" 32 bits, "l" 64 bits; "=" marks an output, "=&" an output that is written
before all inputs are read. An fp16x2 register holds two fp16 values, the first in its lower half. Warps have 32 lanes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from quantkit.formats import ElementGrid

__all__ = [
    "Assembly",
    "convert_to_fp16x2",
    "fp16_norm",
    "fp16_norm_x2",
    "fp32_error",
    "hessian_bounds_x2",
    "magnitude",
    "max_magnitude_x2",
    "pack_levels",
    "pack_quotients",
    "reciprocal",
    "reciprocal_root",
    "rotate",
    "shared_memory",
]

ALL_LANES = "0xffffffff"


@dataclass(frozen=True)
class Assembly:
    """PTX text and its operands' constraints, as ``tl.inline_asm_elementwise`` takes them."""

    text: str
    constraints: str


# ---- single instructions ---------------------------------------------------------------------------------------------


def reciprocal(type: str) -> Assembly:
    """Approximate 1/x in ``type``, f32 or f64: the result; x. Both are normal numbers."""
    register = {"f32": "f", "f64": "d"}[type]
    return Assembly(f"rcp.approx.ftz.{type} $0, $1;", f"={register},{register}")


def reciprocal_root() -> Assembly:
    """Approximate float64 1/√x: the result; x. Both are normal numbers."""
    return Assembly("rsqrt.approx.ftz.f64 $0, $1;", "=d,d")


def magnitude(function: str) -> Assembly:
    """Float32 max or min (``function``) of |x| and a bound ≥ 0, with x's sign: the result; x, the bound."""
    return Assembly(f"{function}.xorsign.abs.f32 $0, $1, $2;", "=f,f,f")


def max_magnitude_x2(type: str) -> Assembly:
    """Elementwise larger magnitude of two ``type``x2 registers, NaN if either is NaN: the result; a, b.

    ``type``: bf16 or f16. The result has the sign of the product a · b.
    """
    return Assembly(f"max.NaN.xorsign.abs.{type}x2 $0, $1, $2;", "=r,r,r")


def convert_to_fp16x2(rounding: str) -> Assembly:
    """fp16x2 of two float32 values: the result; lower value, upper value. ``rounding``: rn or rz."""
    return Assembly(f"cvt.{rounding}.f16x2.f32 $0, $2, $1;", "=r,f,f")


# ---- element codes ---------------------------------------------------------------------------------------------------


# Operands of both packings: four bytes of codes; four even and four odd elements.
PACK_CONSTRAINTS = "=r,f,f,f,f,f,f,f,f"

# Packs two registers of four E4M3 bytes, one of even and one of odd elements. The upper bits of an E4M3 byte hold
# E2M1's code and sign, so two masked moves per register extract them.
_PACK_E4M3 = """
            shr.b32 up, even, 2;
            shr.b32 even, even, 4;
            lop3.b32 even, up, even, 0x07070707, 0xE4;
            shl.b32 up, odd, 2;
            lop3.b32 odd, up, odd, 0x7f7f7f7f, 0xE4;
            lop3.b32 $0, even, odd, 0x0f0f0f0f, 0xE4;
            }"""


def pack_levels() -> Assembly:
    """Four bytes of E2M1 codes from float32 levels: the bytes; four even and four odd levels.

    A level is an element value times 2^-6. One instruction converts two levels to E4M3.
    """
    lines = ["{ .reg .b16 low, high; .reg .b32 even, odd, up;"]
    for word, first in (("even", 1), ("odd", 5)):
        lines += [
            f"cvt.rn.satfinite.e4m3x2.f32 low, ${first + 1}, ${first};",
            f"cvt.rn.satfinite.e4m3x2.f32 high, ${first + 3}, ${first + 2};",
            f"mov.b32 {word}, {{low, high}};",
        ]
    return Assembly("\n".join(lines) + _PACK_E4M3, PACK_CONSTRAINTS)


def _round_to_grid_x2(level: str, x: str, spare: str) -> list[str]:
    """Rounds fp16x2 ``x`` to the element grid, ties to even, as device.round_to_grid does, into ``level``.

    The arguments are registers. The registers ``least`` and ``times`` hold the rounding's two constants in fp16x2. The
    level is not saturated, and a zero loses its sign.
    """
    return [
        f"max.xorsign.abs.f16x2 {level}, {x}, least;",
        f"neg.f16x2 {spare}, {x};",
        f"fma.rn.f16x2 {spare}, {level}, times, {spare};",
        f"neg.f16x2 {spare}, {spare};",
        f"fma.rn.f16x2 {level}, {level}, times, {spare};",
    ]


def _fp16x2(value: float) -> str:
    """Bits of an fp16x2 constant with ``value`` in both halves."""
    return f"0x{2 * struct.pack('>e', value).hex()}"


def pack_quotients(element: ElementGrid) -> Assembly:
    """Four bytes of codes from signed float32 quotients times 2^-6: the bytes; four even and four odd quotients.

    fp16 must hold each quotient exactly, unless it is far below the smallest tie or above fp16's largest number. Each
    instruction rounds two quotients.
    """
    unit = 2.0 ** (element.bias - 7)
    least = 2.0**element.min_exponent * (1 + 2.0 ** (element.mantissa_bits - 9)) * unit
    lines = [
        "{ .reg .b16 low, high; .reg .b32 even, odd, up, y, level, least, most, times;",
        f"mov.b32 least, {_fp16x2(least)};",
        f"mov.b32 most, {_fp16x2(element.max_value * unit)};",
        f"mov.b32 times, {_fp16x2(2.0 ** (10 - element.mantissa_bits))};",
    ]
    for word, first in (("even", 1), ("odd", 5)):
        for half, at in (("low", first), ("high", first + 2)):
            lines += [
                f"cvt.rn.f16x2.f32 y, ${at + 1}, ${at};",
                "min.xorsign.abs.f16x2 y, y, most;",
                *_round_to_grid_x2("level", "y", "up"),
                "lop3.b32 level, level, y, 0x80008000, 0xD8;",  # a zero gets its quotient's sign back
                f"cvt.rn.satfinite.e4m3x2.f16x2 {half}, level;",
            ]
        lines.append(f"mov.b32 {word}, {{low, high}};")
    return Assembly("\n".join(lines) + _PACK_E4M3, PACK_CONSTRAINTS)


# ---- shared memory ---------------------------------------------------------------------------------------------------


def shared_memory(name: str, size: int, alignment: int) -> Assembly:
    """The 32-bit address of ``size`` bytes of shared memory: the address; any 32-bit value, which is not read."""
    return Assembly(f"{{.shared .align {alignment} .b8 {name}[{size}]; mov.u32 $0, {name};}}", "=r,r")


def rotate(size: int) -> Assembly:
    """All ``size`` float64 values of a warp, through shared memory: ``size`` results; the lane's value, the address
    where it is written, the buffer's address.

    Every lane reads the whole buffer in order, so the written addresses determine the order of the results.
    """
    value, own, base = (f"${size + index}" for index in range(3))
    lines = [
        f"bar.warp.sync {ALL_LANES};",
        f"st.shared.f64 [{own}], {value};",
        f"bar.warp.sync {ALL_LANES};",
    ]
    for place in range(0, size, 2):
        lines.append(f"ld.shared.v2.f64 {{${place}, ${place + 1}}}, [{base}+{8 * place}];")
    return Assembly("\n".join(lines), ",".join(["=&d"] * size + ["d", "r", "r"]))


# ---- ‖r A‖ in fp16 ---------------------------------------------------------------------------------------------------
#
# mma.m16n8k16 for a warp of 32 blocks. mma distributes each row of r over four lanes, so residuals go through shared
# memory, in lines of 128 bytes. Elements 8 c … 8 c + 7 of the block of lane 4 g + t lie at byte 16 (g xor 2 t) of line
# t · block_size / 8 + c. So eight lanes that write their own elements, or that read those of eight g, have no bank
# conflict. Lane t of quad g receives four sums of squares and keeps the one of its own block.


def factor_registers(block_size: int) -> int:
    """Number of registers per lane for A: two fp16x2 for each 8 × 16 tile on and below the diagonal."""
    depth, eights = block_size // 16, block_size // 8
    return 2 * sum(depth - column // 2 for column in range(eights))


def fp16_norm(block_size: int) -> Assembly:
    """‖r A‖² and Σ |r_i| w_i of each lane's block: the two float32 results; ``block_size`` float32 residuals, A, w, and
    the shared-memory operands.

    A is ``factor_registers`` of fp16x2 and w block_size / 8 of fp16x2, both in mma's layout. The shared-memory operands
    are the buffer's address, the lane's write offset, its read offset, and the lane's index.
    """
    residuals = []
    for chunk in range(block_size // 8):
        for word in range(4):
            low = 2 + 8 * chunk + 2 * word
            residuals.append([f"cvt.rn.f16x2.f32 r{word}, ${low + 1}, ${low};"])
    return _norm(block_size, [], residuals, ["f"] * block_size)


def fp16_norm_x2(block_size: int) -> Assembly:
    """``fp16_norm`` from elements instead of residuals, at power-of-two scales: the two float32 results; block_size / 2
    fp16x2 elements, three float32 constants of the rounding, A, w, and the shared-memory operands.

    The constants are ``least`` of _round_to_grid_x2 times the scale, the largest level times the scale, and ``times``.
    """
    constants = 2 + block_size // 2
    least, most, times = (f"${constants + index}" for index in range(3))
    start = [f"cvt.rn.f16x2.f32 {name}, {given}, {given};" for name, given in (("least", least), ("most", most))]
    start.append(f"cvt.rn.f16x2.f32 times, {times}, {times};")
    residuals = []
    for chunk in range(block_size // 8):
        for word in range(4):
            x = f"${2 + 4 * chunk + word}"
            residuals.append(
                [
                    *_round_to_grid_x2("level", x, "minus"),
                    "min.xorsign.abs.f16x2 level, level, most;",
                    f"sub.rn.f16x2 r{word}, {x}, level;",
                ]
            )
    return _norm(block_size, start, residuals, ["r"] * (block_size // 2) + ["f"] * 3)


def _norm(block_size: int, start: list[str], residuals: list[list[str]], inputs: list[str]) -> Assembly:
    """``fp16_norm`` of the residuals that ``start`` and ``residuals`` compute from ``inputs``.

    ``residuals`` has the text that computes each fp16x2 of residuals, into r0 … r3 in turn.
    """
    depth, eights = block_size // 16, block_size // 8
    factor = 2 + len(inputs)
    weight = factor + factor_registers(block_size)
    shared, own, row, lane = (f"${weight + 2 * depth + index}" for index in range(4))
    lines = [
        ".reg .pred odd, upper;",
        f".reg .b32 at, bits, least, most, times, level, minus, r<4>, a<{4 * depth}>, n<{4 * depth}>;",
        ".reg .f32 zero, own, other, c<4>, e<4>, w<4>, s<4>;",
        "mov.f32 zero, 0f00000000;",
        f"add.u32 at, {shared}, {own};",
        f"bar.warp.sync {ALL_LANES};",
        *start,
    ]
    for chunk in range(eights):
        for word in residuals[4 * chunk : 4 * chunk + 4]:
            lines += word
        lines.append(f"st.shared.v4.b32 [at+{128 * chunk}], {{r0, r1, r2, r3}};")
    lines.append(f"bar.warp.sync {ALL_LANES};")
    for half in range(2):
        lines += [
            *_load_residuals(half, depth, row, shared),
            *_weighted_sums(half, depth, weight),
            *_sums_of_squares(half, depth, factor),
        ]
    lines += _keep_own_sums(lane)
    constraints = [*["=&f"] * 2, *inputs, *["r"] * (factor_registers(block_size) + 2 * depth + 4)]
    return Assembly("{" + "\n".join(lines) + "}", ",".join(constraints))


PRODUCT = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
ZEROS = "{zero, zero, zero, zero}"


def _registers(name: str, step: int) -> str:
    """The four registers of one 16 × 16 tile of residuals."""
    return "{" + ", ".join(f"{name}{4 * step + index}" for index in range(4)) + "}"


def _load_residuals(half: int, depth: int, row: str, shared: str) -> list[str]:
    """Loads 16 blocks of a warp, the lower or upper ``half``, as ``depth`` tiles of registers a0, a1, …"""
    lines = [f"xor.b32 at, {row}, {64 * half};", f"add.u32 at, at, {shared};"]
    for step in range(depth):
        offset = 128 * (2 * half * 2 * depth + 2 * step)
        lines.append(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {_registers('a', step)}, [at+{offset}];")
    return lines


def _weighted_sums(half: int, depth: int, weight: int) -> list[str]:
    """Σ |r_i| w_i of 16 blocks in w0 … w3; ``weight``: the first operand of w."""
    lines, before = [], ZEROS
    for step in range(depth):
        for index in range(4):
            lines.append(f"and.b32 n{4 * step + index}, a{4 * step + index}, 0x7fff7fff;")
        b = f"${weight + 2 * step}, ${weight + 2 * step + 1}"
        lines.append(f"{PRODUCT} {{e0, e1, e2, e3}}, {_registers('n', step)}, {{{b}}}, {before};")
        before = "{e0, e1, e2, e3}"
    return [*lines, f"mov.f32 w{2 * half}, e0;", f"mov.f32 w{2 * half + 1}, e2;"]


def _sums_of_squares(half: int, depth: int, factor: int) -> list[str]:
    """A lane's part of ‖r A‖² of 16 blocks in s0 … s3; ``factor``: the first operand of A, which has no zero tiles."""
    lines, at = [], factor
    for column in range(2 * depth):
        before = ZEROS
        for step in range(column // 2, depth):
            lines.append(f"{PRODUCT} {{c0, c1, c2, c3}}, {_registers('a', step)}, {{${at}, ${at + 1}}}, {before};")
            before = "{c0, c1, c2, c3}"
            at += 2
        for index in range(4):
            total = f"s{2 * half + index // 2}"
            square = f"{total}, c{index}, c{index}"
            first = column == 0 and index % 2 == 0
            lines.append(f"mul.f32 {square};" if first else f"fma.rn.f32 {square}, {total};")
    return lines


def _keep_own_sums(lane: str) -> list[str]:
    """Adds the parts of a quad's four lanes by two shuffles; each lane keeps its own block's sums."""
    lines = [
        f"and.b32 bits, {lane}, 1;",
        "setp.ne.u32 odd, bits, 0;",
        f"and.b32 bits, {lane}, 2;",
        "setp.ne.u32 upper, bits, 0;",
    ]
    for kept in range(2):
        lines += [
            f"selp.f32 other, s{kept}, s{kept + 2}, upper;",
            f"selp.f32 s{kept}, s{kept + 2}, s{kept}, upper;",
            f"shfl.sync.bfly.b32 other, other, 2, 0x1f, {ALL_LANES};",
            f"add.f32 s{kept}, s{kept}, other;",
            f"selp.f32 w{kept}, w{kept + 2}, w{kept}, upper;",
        ]
    return [
        *lines,
        "selp.f32 other, s0, s1, odd;",
        "selp.f32 own, s1, s0, odd;",
        f"shfl.sync.bfly.b32 other, other, 1, 0x1f, {ALL_LANES};",
        "add.f32 $0, own, other;",
        "selp.f32 $1, w1, w0, odd;",
    ]


# ---- ‖r A‖² in float32 -----------------------------------------------------------------------------------------------


def fp32_error(block_size: int) -> Assembly:
    """‖r A‖² of a block that four lanes share: the float32 result; ``block_size`` float32 residuals, a 64-bit address.

    Each of the four lanes computes every fourth column; the address is that of its first column in Aᵀ.
    """
    address = block_size + 1
    lines = [".reg .f32 a<4>, projected, total;", "mov.f32 total, 0f00000000;"]
    for column in range(0, block_size, 4):
        for start in range(column, block_size, 4):
            lines.append(f"ld.global.v4.f32 {{a0, a1, a2, a3}}, [${address}+{4 * (column * block_size + start)}];")
            for row in range(4):
                product = f"projected, ${1 + start + row}, a{row}"
                lines.append(f"mul.f32 {product};" if start + row == column else f"fma.rn.f32 {product}, projected;")
        lines.append("fma.rn.f32 total, projected, projected, total;")
    for distance in (1, 2):
        lines.append(f"shfl.sync.bfly.b32 projected, total, {distance}, 0x1f, {ALL_LANES};")
        lines.append("add.f32 total, total, projected;")
    text = "{" + "\n".join([*lines, "mov.f32 $0, total;"]) + "}"
    return Assembly(text, ",".join(["=f", *["f"] * block_size, "l"]))


# ---- the Hessian's window --------------------------------------------------------------------------------------------


def hessian_bounds_x2(block_size: int) -> Assembly:
    """max(|x_i| − t_i, 0) and the least |x_i| + t_i with |x_i| > t_i, t_i = radius · root_i: the two float32 results;
    the float32 radius, block_size / 2 fp16x2 elements x, block_size / 2 fp16x2 roots.

    All arithmetic is in fp16x2. The second result is infinite where no |x_i| exceeds its t_i.
    """
    x, factor = 3, 3 + block_size // 2
    lines = [
        ".reg .b16 low, high;",
        ".reg .b32 radius, minus, x, less, more, most, least, zero, none;",
        "cvt.rn.f16x2.f32 radius, $2, $2;",
        "neg.f16x2 minus, radius;",
        "mov.b32 zero, 0;",
        "mov.b32 most, 0;",
        "mov.b32 least, 0x7c007c00;",
    ]
    for index in range(block_size // 2):
        lines += [
            f"abs.f16x2 x, ${x + index};",
            f"fma.rn.f16x2 less, ${factor + index}, minus, x;",
            f"fma.rn.f16x2 more, ${factor + index}, radius, x;",
            "max.f16x2 most, most, less;",
            "set.le.u32.f16x2 none, less, zero;",
            "or.b32 more, more, none;",  # NaN where |x| is within its reach: min ignores NaN
            "min.f16x2 least, least, more;",
        ]
    for result, name, function in ((0, "most", "max"), (1, "least", "min")):
        lines += [
            f"mov.b32 {{low, high}}, {name};",
            f"{function}.f16 low, low, high;",
            f"cvt.f32.f16 ${result}, low;",
        ]
    return Assembly("{" + "\n".join(lines) + "}", ",".join(["=f", "=f", "f", *["r"] * block_size]))
