"""Compile every kernel for named targets without a GPU; prints one JSON object per kernel and target.

Run as a program, because a process whose kernels run in Triton's interpreter cannot compile them.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from kvtool.kernels import (
    decode,
    decode_affine,
    decode_gluon,
    decode_h1b,
    decode_levels,
    decode_rina,
    encode,
    encode_stages,
    gather,
    mean,
    merge,
    nucleus,
    query,
    query_levels,
    sketch,
    tail,
)
from kvtool.kernels.fragments import OFFSET

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    **dict.fromkeys(("QUERIES", "X", "KEYS", "VALUES", "NEW_KEY", "NEW_VALUE"), "*bf16"),
    **dict.fromkeys(("LENGTH",), "*i64"),
    **dict.fromkeys(("QUERY",), "*i8"),
    **dict.fromkeys(("FLAGS", "GAINS", "KINDS", "EXTRA_INDEX", "EXTRA_BITS", "EXTRA_LEVELS"), "*u8"),
    **dict.fromkeys(("KEY_SCALES", "VALUE_SCALES", "SCALES", "MATRIX", "CORRECTION"), "*fp16"),
    **dict.fromkeys(("KEY_NORMS", "KEY_STEPS", "KEY_MINIMA", "VALUE_STEPS", "VALUE_MINIMA"), "*fp16"),
    **dict.fromkeys(("CODE_SCALES", "WAVES", "ESTIMATES", "TERMS", "STEP_COS", "STEP_SIN"), "*fp16"),
    **dict.fromkeys(("TABLES", "CODE_PAGES", "COUNTS", "PLACES", "LISTS", "NUMBER"), "*i32"),
    **dict.fromkeys(("BIAS",), "*i16"),
    **dict.fromkeys(("QUERY_WORDS", "KEY_CODES", "VALUE_CODES", "KEY_GAINS", "VALUE_GAINS", "TABLE"), "*i32"),
    **dict.fromkeys(("SHARES", "STEPS", "SLOTS", "POSITIONS", "CHANNEL", "TURNS", "WAVE_WORDS"), "*i32"),
    **dict.fromkeys(
        ("QUERY_START", "KEY_PAGES", "VALUE_PAGES", "KEY_TABLE", "VALUE_TABLE", "PAGES", "PAGE_TABLE", "WORDS"), "*i32"
    ),
}
SMALL = dict.fromkeys(("KEY_NORMS", "VALUE_NORMS", "KEY_LEVELS", "VALUE_LEVELS"), "*i32")  # rina's
FLOATS = (
    "factor",
    "softcap",
    "step",
    "root",
    "spread",
    "share",
    "unit",
    "limit",
    "p",
    "scale",
    "scaling",
    "square_factor",
)


def jobs(target: str):
    """Kernel, its constants and its options, for one target."""
    nvidia, hopper = target != "gfx942", target == "sm_90"
    dims = {"H": 8, "ROWS": 8, "BLOCKS": 1}
    square = {"D": 128, "C": 128, "DIMS": 128, "CHANNELS": 128, "PDL": hopper}
    yield "prepare", query.prepare, {**dims, **square, "PER": 128, "S": 1, "TILE": 16}, {"num_warps": 8}
    yield "merge", merge.merge, {**dims, **square, "SPLITS": 64, "SLOTS": None}, {"num_warps": 8}
    exact = {"H": 8, "GROUP": 4, "D": 128, "DIMS": 128, "BLOCK": 64, "CAPPED": False, "WIDE": False, "EARLY": True}
    yield "tail", tail._tail, {**exact, "PDL": hopper}, {"num_warps": 8, "num_stages": 2}
    yield from level_jobs(dims, square, target)
    turned = {"H": 8, "S": 1, "D": 128, "DIMS": 128, "HALF": 64, "BLOCK": 64, "ROWS": 4, "TILE": 64}
    yield "mean", mean._polynomial, turned, {"num_warps": 4}
    four = (4, 4, 4, 4)
    units = {"GROUPS": 4, "ROWS": 4, "HALF": 64, "BLOCK": 128, "H": 8, "D": 128, "SCALE": 1, "ASM": nvidia}
    flags = {"KEYS": True, "CENTRED": True, "TURNED": True, "WIDTH": 4}
    yield "encode", encode._encode, {**units, **flags}, {"num_warps": 4, "num_stages": 1}
    plain = {"KEYS": False, "CENTRED": False, "TURNED": False, "WIDTH": 3}
    options = {"num_warps": 4, "num_stages": 1, **({"maxnreg": 168} if hopper else {})}
    yield "encode values", encode._encode, {**units, **plain}, options
    chained = {"H": 8, "D": 128, "STAGES": 2, "WIDTHS": (3, 2), "STEPS": (0.0, 0.0), "HALF": 64, "ASM": nvidia}
    held = {"HELD": nvidia, "BLOCK": 128 if nvidia else 64, "KEYS": False, "SPLIT": False, "AGAIN": False}
    flat = {"CENTRED": False, "TURNED": False}
    yield "encode stages", encode_stages._encode_stages, {**chained, **held, **flat}, {"num_warps": 4, "num_stages": 1}
    ranges = {"KEY_SPAN": 32, "VALUE_SPAN": 1, "KEY_PER_TOKEN": False, "VALUE_PER_TOKEN": True}  # KIVI's
    for side in ("KEY", "VALUE"):
        ranges |= {f"{side}_WIDTH": 4, f"{side}_UNIT": decode_affine.UNIT[4], f"{side}_ZERO": decode_affine.ZERO[4]}
    loop = {"CAPPED": False, "STAGES": 3, "WARPS": 4, "ASM": nvidia}
    if target == "sm_90":
        yield "affine", decode_affine.decode, {**dims, **ranges, **loop, "D": 64, "GROUPS": 2}, {"num_warps": 4}
    limit = {"maxnreg": 168} if nvidia else {}
    yield from sign_jobs(dims, square, loop, limit, target)
    yield from top_p_jobs(dims | {"PDL": hopper}, target)
    widths = {"4": (four, four), "mixed": ((4, 2, 2, 1), (3, 2, 2, 2)), "1": ((1,) * 4, (1,) * 4)}
    for name, (keys, values) in (widths | {"gains": ((4, 2), (2, 1))}).items():
        common = {
            **dims, "KEY_GROUPS": len(keys), "VALUE_GROUPS": len(values), "KEY_WIDTHS": keys, "VALUE_WIDTHS": values,
            "KEY_OFFSETS": starts(keys), "VALUE_OFFSETS": starts(values),
            "LEVEL_OFFSETS": tuple(OFFSET[width] for width in values),
            "PAGED": name != "gains", "BIASED": name == "gains", "CAPPED": False, "STAGES": 3, "PDL": hopper,
        }  # fmt: skip
        if target != "sm_90" and name != "4" and (nvidia or name != "gains"):
            continue  # the code does not depend on the target, the compiler's time does
        if name != "1":
            plain = {"WARPS": 4, "ASM": nvidia, "GAINS": name == "gains", "KINDED": False}
            # mixed as tiered reads it, with the sums of every page
            plain |= {} if name == "mixed" else {"PAGE_LSE": None}
            few = {} if name == "gains" else limit
            yield f"decode {name}", decode.decode, {**common, **plain}, {"num_warps": 4, **few}
        if nvidia and name != "gains":
            raw = {"RAW": max(keys) == 1, "ROWS": 4}
            yield f"decode_gluon {name}", decode_gluon.decode, {**common, **raw}, {"num_warps": 4}


def level_jobs(dims, square, target):
    """The kernels of rdkv."""
    nvidia, hopper = target != "gfx942", target == "sm_90"
    yield "merge slots", merge.merge, {**dims, **square, "SPLITS": 128}, {"num_warps": 8}
    mean = {"S": 1, "COUNT": 64, "STILL": False}
    yield "query levels", query_levels.prepare, {**dims, **square, **mean}, {"num_warps": 8 if nvidia else 4}
    if target != "sm_80":  # half a minute of the compiler's time at head_dim 128
        loop = {"GROUPS": 4 if hopper else 2, "CAPPED": False, "STAGES": 1, "WARPS": 4, "ASM": nvidia, "PDL": hopper}
        yield "levels", decode_levels.decode, {**dims, "COUNT": 64, **loop}, {"num_warps": 4}


def top_p_jobs(dims, target):
    """The kernels of rabitq's top-p mode."""
    warps = {"num_warps": 4}
    bits = {"S": 1, "D": 128, "P": 128, "DIMS": 128, "CHANNELS": 128, "BITS": 4, "BINS": nucleus.BINS.value}
    yield "rotate", sketch.prepare, {**dims, **bits, "CENTRED": True}, {"num_warps": 8}
    flags = {"S": 1, "GROUPS": 4, "CAPPED": False, "STAGES": 3, "WARPS": 4, "ASM": target != "gfx942"}
    everything = target == "sm_90"  # the code does not depend on the target, the compiler's time does
    for name, centred in (("score", False), ("score centred", True))[: 1 + everything]:
        yield name, sketch.score, {**dims, **flags, "BIASED": centred, "CENTRED": centred}, warps
    yield "weigh", nucleus.weigh, {**dims, "SCORE_SPLITS": 64, "USED": 4, "BLOCK": 1024, "EVERY": 4}, warps
    rows = {"SCORE_SPLITS": 64, "SPLITS": 64, "USED": 4, "TILE": 64, "D": 128, "DIMS": 128, "WIDE": False}
    lists = {"COUNT_SPLITS": 16, "S": 1, "BLOCK": 1024, "EVERY": 4, "CAPPED": False}
    for name, again in (("rescore", False), ("rescore again", True))[1 - everything :]:
        yield name, gather.rescore, {**dims, **rows, **lists, "AGAIN": again}, warps
    yield "read", gather.read, {**dims, **rows}, warps


def sign_jobs(dims, square, loop, limit, target):
    """The kernels of h1b and rina."""
    hopper = target == "sm_90"
    yield "sketch", query.sketch, {**dims, **square, "S": 1, "BITS": 128, "COSINE": True}, {"num_warps": 8}
    yield "prepare_levels", query.prepare_levels, {**dims, **square, "S": 1, "TILE": 16}, {"num_warps": 8}
    if target == "sm_80":
        return  # the code does not depend on the target, the compiler's time does
    loop = loop | {"BIASED": False, "PDL": hopper}
    signs = {"BITS": 128, "KEY_GROUPS": 4, "VALUE_GROUPS": 4, "COSINE": True, "HELD": True}
    codes = {"VALUE_WIDTH": 4, "VALUE_UNIT": decode_affine.UNIT[4], "VALUE_ZERO": 0}
    yield "h1b", decode_h1b.decode, {**dims, **loop, **signs, **codes}, {"num_warps": 4, **limit}
    if hopper:  # another shape elsewhere, because either takes the compiler long
        spaces = {"D": 128, "GROUPS": 4, "SPACES": 4, "SPAN": 1, "PARTS": 1}
        stages = {"KEY_STAGES": 1, "VALUE_STAGES": 1, "EXTRA": 0}
        yield "rina", decode_rina.decode, {**dims, **loop, **spaces, **stages}, {"num_warps": 4, **limit}
    spaces = {"D": 64, "GROUPS": 2, "SPACES": 1, "SPAN": 2, "PARTS": 1}
    stages = {"KEY_STAGES": 1, "VALUE_STAGES": 1 if hopper else 2, "EXTRA": 32}
    yield "rina extra", decode_rina.decode, {**dims, **loop, **spaces, **stages}, {"num_warps": 4}


def starts(widths):
    return tuple(64 * sum(widths[:i]) for i in range(len(widths)))


def compiled(kernel, constants, options, target):
    signature = {}
    for name in kernel.arg_names:
        scalar = "fp32" if name in FLOATS else "i32"
        pointers = POINTERS | (dict.fromkeys(("KEY_SCALES", "VALUE_SCALES"), "*i32") if constants.get("GAINS") else {})
        pointers |= SMALL if "KEY_STAGES" in constants else {}
        pointers |= {"TABLE": "*fp32"} if "MATRIX" in kernel.arg_names else {}
        kind = pointers.get(name, scalar if name == "T" or not name.isupper() else "*fp32")
        signature[name] = "constexpr" if name in constants else kind
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*")
        or re.fullmatch(
            r"((key|value)(_scale|_range|_level)?|norm|scales|words|x|query|map|matrix|page|scale)_[bhprst]"
            "|T|room",
            name,
        )
    }
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return triton.compile(source(kernel, signature, constants, aligned), target=target, options=options)


def resources(result, target):
    """Registers, bytes of spill and of shared memory, as the assembler counts them."""
    found = {"shared": result.metadata.shared, "narrow": narrow(result.asm["ttgir"])}
    if "cubin" in result.asm:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(result.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        found |= {
            name: int(re.search(rf"{key}:(\d+)", usage)[1]) for name, key in (("registers", "REG"), ("stack", "STACK"))
        }
    else:
        text = result.asm["amdgcn"]
        found |= {"registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])}
        found |= {"stack": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])}
    return found


def narrow(text):
    """Products of NVIDIA's tensor cores that sum fewer numbers than four lanes are given, which come out wrong."""
    if "#ttg.nvidia_mma" not in text:
        return 0
    operand = r"tensor<[\dx]*x(\d+)x[a-z]\w*, #ttg\.dot_op<{opIdx = 0, parent = #mma\d*, kWidth = (\d+)}>>"
    dots = re.findall(rf"tt\.dot .*?: {operand}", text)
    return sum(int(numbers) < 4 * int(width) for numbers, width in dots)


if __name__ == "__main__":
    wanted = sys.argv[1]
    for name, kernel, constants, options in jobs(wanted):
        result = compiled(kernel, constants, options, TARGETS[wanted])
        print(json.dumps({"kernel": name, "target": wanted, **resources(result, wanted)}), flush=True)
