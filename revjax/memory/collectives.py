"""What a compiled program exchanges between devices: its collectives, loops multiplied out."""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# Those of a type of HLO; that of an exotic one, f8e4m3fn, say, begins with its bits.
BITS = re.compile(r"[a-z]+(\d+)")

# A computation begins at the margin, its instructions are indented.
COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*?^}", re.MULTILINE | re.DOTALL)
COLLECTIVE = re.compile(rf"^ +(?:ROOT )?%\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\(", re.MULTILINE)
LOOP = re.compile(r"^.* while\(.*condition=%([^\s,]+), body=%([^\s,]+).*$", re.MULTILINE)
CALLED = re.compile(r"(?:calls|to_apply|(?:true|false)_computation)=%([^\s,})]+)")
BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
LENGTH = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Array(NamedTuple):
    """What a device has of an array after it has moved."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes without padding."""
        bits = BITS.match(self.dtype)
        return math.prod(self.shape) * (int(bits[1]) if bits else 8) // 8


CONTEXT = Array("u32", ())


class Collective(NamedTuple):
    """One operation of a program that exchanges arrays, all of them at once."""

    kind: str  # one of KINDS
    arrays: tuple[Array, ...]  # its results
    times: int  # how often the program makes it


def read_collectives(text: str) -> list[Collective]:
    """The collectives of a program.

    A loop counts with its length where the program tells it, and else once; of a conditional every
    branch counts.

    Args:
        text: of the optimised program, as `compiled.as_text()` returns it.
    """
    bodies, entry = {}, ""
    for found in COMPUTATION.finditer(text):
        bodies[found[2]] = found[0]
        entry = found[2] if found[1] else entry
    collectives: list[Collective] = []

    def visit(name: str, times: int) -> None:
        body = bodies.get(name, "")
        for result, kind, started in COLLECTIVE.findall(body):
            arrays = tuple(
                Array(dtype, tuple(map(int, filter(None, shape.split(",")))))
                for dtype, shape in ARRAY.findall(re.sub(r"\{.*?\}", "", result))
            )
            if started and kind != "all-reduce":  # operands, results, contexts
                arrays = tuple(array for array in arrays if array != CONTEXT)
                arrays = arrays[len(arrays) // 2 :]
            collectives.append(Collective(kind, arrays, times))
        for loop in LOOP.finditer(body):
            visit(loop[2], times * _length(loop[0], bodies.get(loop[1], "")))
        for called in CALLED.findall(body):
            visit(called, times)
        for branches in BRANCHES.findall(body):
            for branch in branches.replace("%", "").split(", "):
                visit(branch, times)

    visit(entry, 1)
    return collectives


def _length(loop: str, condition: str) -> int:
    """How often a loop is gone through: it says so, or compares its counter with a constant."""
    if said := LENGTH.search(loop):
        return int(said[1])
    compared = re.search(r"ROOT .* compare\(.*%(\S+?)\), direction=LT", condition)
    if compared is None:
        return 1
    constant = re.search(rf"%{re.escape(compared[1])} = .* constant\((\d+)\)", condition)
    return int(constant[1]) if constant else 1
