"""Read what a GPU executes in a training step from the text of XLA's optimized HLO.

The text is internal to XLA. The functions here were written for that of JAX 0.10; they raise `UnknownTextError`
if they do not understand it.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "token": 0, "f8e4m3fn": 1, "f8e5m2": 1}
_SHAPE = re.compile(r"\b(pred|bf16|token|f8e4m3fn|f8e5m2|[suf]\d+|c\d+)\[([\d,]*)\]")
# operations that are no kernel
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "opt-barrier"}
_COPIES = {"copy", "transpose", "copy-start"}
_LIBRARY_THUNKS = {"Convolution", "ConvolutionReorder", "Gemm", "CublasLtMatmul", "CuDnn"}


class UnknownTextError(Exception):
    """The text of a program is not as this module expects it."""


class Instruction(NamedTuple):
    """One instruction of HLO."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # names; of a parameter its number
    attributes: str  # the rest of the line
    is_root: bool


Computation = dict[str, Instruction]


class Kernel(NamedTuple):
    """A kernel that the GPU executes, or a call of cuDNN or cuBLAS."""

    name: str
    kind: str  # convolution, matmul, reduction, transpose, elementwise or other
    bytes_read: int
    bytes_written: int
    flops: int  # of products
    dtype: str  # of the first result
    window: int = 1  # largest side of a convolution's window, in pixels
    groups: int = 1  # of a convolution
    channels: int = 0  # the smaller of a convolution's numbers of input and output channels in a group
    blocks: int = 0  # thread blocks of 128 × 64 outputs of a forward convolution; 0: the sum is divided too
    is_weight_gradient: bool = False  # a convolution that cuDNN knows as BackwardFilter

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


class Step(NamedTuple):
    """The kernels of a training step, in the order of the schedule."""

    kernels: tuple[Kernel, ...]
    trip_count: int | None  # of the loop over steps; None: there is none, or XLA does not know it
    in_loop: bool  # whether the program loops over steps


def read_step(text: str) -> Step:
    """Read the body of the largest loop of a program, or the whole program if it has no loop.

    Args:
      text: optimized HLO, as `jax.stages.Compiled.as_text` returns it.

    Raises:
      UnknownTextError: the text is not as expected.
    """
    try:
        computations, entry = _parse(text)
        loops = [
            instruction
            for computation in computations.values()
            for instruction in computation.values()
            if instruction.opcode == "while"
        ]
        loop = max(loops, key=lambda i: len(computations[_called(i, "body")]), default=None)
        if loop is None or len(computations[_called(loop, "body")]) < len(computations[entry]) / 2:
            return Step(tuple(_list_kernels(computations[entry], computations)), None, in_loop=False)
        count = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        kernels = tuple(_list_kernels(computations[_called(loop, "body")], computations))
        return Step(kernels, int(count[1]) if count else None, in_loop=True)
    except (KeyError, IndexError, ValueError, TypeError, StopIteration) as error:
        raise UnknownTextError(f"{type(error).__name__}: {error}") from error


class Launches(NamedTuple):
    """What the host launches in each step."""

    graphs: int  # CUDA graphs
    external_calls: int  # of cuDNN and cuBLAS, outside of graphs
    kernels: int  # and copies, outside of graphs
    loop_in_graph: bool  # whether the loop over steps is part of a graph, so that the host launches nothing


def read_launches(text: str) -> Launches:
    """Read the launches of a step from the thunk sequence that XLA writes if `xla_dump_to` is set.

    Args:
      text: content of the file `*.thunk_sequence_after_thunk_passes.txt`.

    Raises:
      UnknownTextError: the text is not as expected.
    """
    thunks = [
        (len(match[1]), match[2]) for line in text.splitlines() if (match := re.match(r"( *)\d+: k(\w+)", line))
    ]
    if not thunks:
        raise UnknownTextError("there is no thunk in the thunk sequence")

    def find_end(start):
        """Return the index after the last thunk that belongs to the one at `start`, by its indent."""
        indent = thunks[start][0]
        return next((i for i in range(start + 1, len(thunks)) if thunks[i][0] <= indent), len(thunks))

    loops = [(find_end(i) - i, i) for i, (_, kind) in enumerate(thunks) if kind == "While"]
    first, last = 0, len(thunks)
    if loops:
        _, loop = max(loops)
        if any(kind == "CommandBuffer" and i < loop < find_end(i) for i, (_, kind) in enumerate(thunks)):
            return Launches(0, 0, 0, loop_in_graph=True)
        first, last = loop + 1, find_end(loop)
    counts: collections.Counter = collections.Counter()
    while first < last:
        kind = thunks[first][1]
        counts["graph" if kind == "CommandBuffer" else "library" if kind in _LIBRARY_THUNKS else "kernel"] += 1
        first = find_end(first)
    return Launches(counts["graph"], counts["library"], counts["kernel"], loop_in_graph=False)


def _parse(text):
    """Return all computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line)):
            instruction = _parse_instruction(match[2], re.sub(r"/\*.*?\*/", "", match[3]), bool(match[1]))
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("there is no ENTRY computation")
    return computations, entry


def _parse_instruction(name, text, is_root):
    shape_end = _end_of_parenthesis(text) if text.startswith("(") else re.match(r"\S+", text).end()
    shape, text = text[:shape_end], text[shape_end:].lstrip()
    opcode = text[: text.index("(")]
    text = text[len(opcode) :]
    end = _end_of_parenthesis(text)
    inside, attributes = text[1 : end - 1], text[end:]
    operands = (inside,) if opcode == "parameter" else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, shape, opcode, operands, attributes, is_root)


def _end_of_parenthesis(text):
    """Return the index after the parenthesis that closes the one at the start of the text."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index + 1
    raise ValueError("a parenthesis is not closed")


def _called(instruction, attribute):
    return re.search(attribute + r"=%?([\w.\-]+)", instruction.attributes)[1]


def count_bytes(shape: str) -> int:
    """Return the size in bytes of a shape such as "(f32[6,10]{1,0}, s32[])"."""
    return sum(
        math.prod(map(int, filter(None, sizes.split(",")))) * _itemsize(dtype)
        for dtype, sizes in _SHAPE.findall(shape)
    )


def _itemsize(dtype):
    return _BYTES[dtype] if dtype in _BYTES else int(dtype[1:]) // 8


def _sizes(shape):
    return [int(size) for size in _SHAPE.search(shape)[2].split(",") if size]


def _list_kernels(computation: Computation, computations: dict[str, Computation]) -> Iterator[Kernel]:
    for instruction in computation.values():
        opcode = instruction.opcode
        if opcode in _FREE or opcode == "while" or opcode.endswith(("-done", "-update")):
            continue
        if opcode in ("call", "async-start") and "to_apply=" in instruction.attributes:
            yield from _list_kernels(computations[_called(instruction, "to_apply")], computations)
        elif opcode == "fusion":
            yield _read_fusion(instruction, computation, computations)
        elif opcode == "custom-call":
            yield _read_custom_call(instruction, computation)
        else:
            kind = "transpose" if opcode in _COPIES else "reduction" if opcode == "reduce" else "other"
            yield _make_kernel(instruction, computation, kind)


def _make_kernel(instruction, computation, kind, **fields):
    read = sum(count_bytes(computation[name].shape) for name in instruction.operands if name in computation)
    return Kernel(
        **{
            "name": instruction.name,
            "kind": kind,
            "bytes_read": read,
            "bytes_written": count_bytes(instruction.shape),
            "flops": 0,
            "dtype": _SHAPE.search(instruction.shape)[1],
            **fields,
        }
    )


def _read_fusion(instruction, computation, computations):
    fused = computations[_called(instruction, "calls")]
    read, written = _fusion_bytes(instruction, computation, fused)
    opcodes = {inner.opcode for inner in fused.values()}
    flops = _count_product_flops(fused, computations)
    if flops:
        kind = "matmul"
    elif "transpose" in opcodes or instruction.name.startswith(("input_transpose", "loop_transpose")):
        kind = "transpose"
    else:
        kind = "reduction" if "reduce" in opcodes else "elementwise"
    return _make_kernel(instruction, computation, kind, bytes_read=read, bytes_written=written, flops=flops)


def _fusion_bytes(instruction, computation, fused):
    """Return the bytes that a fusion reads and writes.

    Of an operand that is only sliced or gathered, what is taken counts; of an update in place, what is put.
    """
    parameters, users = {}, collections.defaultdict(list)
    for inner in fused.values():
        if inner.opcode == "parameter":
            parameters[int(inner.operands[0])] = inner.name
        for name in inner.operands:
            users[name].append(inner)

    def count_taken(name, full):
        taken = 0
        for user in users[name]:
            is_first = user.operands[0] == name
            if user.opcode in ("bitcast", "reshape", "copy"):
                taken += count_taken(user.name, full)
            elif user.opcode == "slice" or (user.opcode in ("dynamic-slice", "gather") and is_first):
                taken += count_bytes(user.shape)
            elif not (user.opcode == "dynamic-update-slice" and is_first):
                return full
        return min(taken, full)

    def count_written(inner):
        if inner.opcode == "tuple":
            return sum(count_written(fused[name]) for name in inner.operands)
        if inner.opcode == "bitcast":
            return count_written(fused[inner.operands[0]])
        if inner.opcode == "dynamic-update-slice":
            return count_bytes(fused[inner.operands[1]].shape)
        return count_bytes(inner.shape)

    read = sum(
        count_taken(parameters[number], count_bytes(computation[name].shape))
        for number, name in enumerate(instruction.operands)
    )
    root = next(inner for inner in fused.values() if inner.is_root)
    return read, count_written(root)


def _count_product_flops(fused, computations):
    """Count the multiplications and additions of the matrix products in a fusion."""
    flops = 0
    for inner in fused.values():
        if inner.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", inner.attributes)[1]
            sizes = _sizes(fused[inner.operands[0]].shape)
            length = math.prod(sizes[int(axis)] for axis in contracted.split(",") if axis)
            flops += 2 * math.prod(_sizes(inner.shape)) * length
        elif inner.opcode == "fusion":
            flops += _count_product_flops(computations[_called(inner, "calls")], computations)
    return flops


def _read_custom_call(instruction, computation):
    target = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)[1]
    if "conv" in target:
        return _read_convolution(instruction, computation, target)
    if "gemm" in target or "matmul" in target:
        axis = re.search(r'"lhs_contracting_dimensions":\["(\d+)"\]', instruction.attributes)[1]
        length = _sizes(computation[instruction.operands[0]].shape)[int(axis)]
        flops = 2 * math.prod(_sizes(instruction.shape)) * length
        return _make_kernel(instruction, computation, "matmul", flops=flops)
    return _make_kernel(instruction, computation, "other")


def _read_convolution(instruction, computation, target):
    """Read a call of cuDNN: images and kernel, gradient and kernel, or images and gradient are its operands."""
    window = [int(n) for n in re.search(r"window=\{size=([\dx]+)", instruction.attributes)[1].split("x")]
    groups = re.search(r"feature_group_count=(\d+)", instruction.attributes)
    groups = int(groups[1]) if groups else 1
    kernel_labels, output_labels = re.search(r"dim_labels=\w+_(\w+)->(\w+)", instruction.attributes).groups()
    first, second = (_sizes(computation[name].shape) for name in instruction.operands[:2])
    result = _sizes(instruction.shape)
    is_weight_gradient, is_input_gradient = "BackwardFilter" in target, "BackwardInput" in target
    kernel = result if is_weight_gradient else second
    outputs = second if is_weight_gradient else first if is_input_gradient else result
    # a kernel's input channels are those of one group
    inputs_of_group, kernel_outputs = (kernel[kernel_labels.index(label)] for label in "io")
    pixels = math.prod(outputs) // outputs[output_labels.index("f")]
    is_forward = not (is_weight_gradient or is_input_gradient)
    return _make_kernel(
        instruction,
        computation,
        "convolution",
        flops=2 * math.prod(outputs) * math.prod(window) * inputs_of_group,
        window=max(window),
        groups=groups,
        channels=min(inputs_of_group, kernel_outputs // groups),
        blocks=groups * math.ceil(pixels / 128) * math.ceil(kernel_outputs / groups / 64) if is_forward else 0,
        is_weight_gradient=is_weight_gradient,
    )
