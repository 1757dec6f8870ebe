"""What a compiled program exchanges between devices: its collectives, loops multiplied out."""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "all-to-all", "ragged-all-to-all", "reduce-scatter")
KINDS += ("collective-broadcast", "collective-permute")
# Those of a type of HLO; that of an exotic one, f8e4m3fn, say, begins with its bits.
BITS = re.compile(r"[a-z]+(\d+)")

# A computation begins at the margin, its instructions are indented.
COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*?^}", re.MULTILINE | re.DOTALL)
COLLECTIVE = re.compile(
    rf"^ +(?:ROOT )?%\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)$", re.MULTILINE
)
CHANNEL = re.compile(r"channel_id=(\d+)")
LOOP = re.compile(r"^.* while\(.*condition=%([^\s,]+), body=%([^\s,]+).*$", re.MULTILINE)
APPLIED = re.compile(r"(?:to_apply|(?:true|false)_computation)=%([^\s,})]+)")
FUSED = re.compile(r"calls=%([^\s,})]+)")
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
    branch counts. What a TPU does beside its arithmetic stands in several fusions, where it begins,
    goes on, inside of loops perhaps, and ends; it counts where it stands in the fewest loops.

    Args:
        text: of the optimised program, as `compiled.as_text()` returns it.
    """
    bodies, entry = {}, ""
    for found in COMPUTATION.finditer(text):
        bodies[found[2]] = found[0]
        entry = found[2] if found[1] else entry
    collectives: list[Collective] = []
    fused: dict[tuple[str, str], Collective] = {}  # by kind and channel

    def visit(name: str, times: int, fusion: bool) -> None:
        body = bodies.get(name, "")
        for result, kind, started, rest in COLLECTIVE.findall(body):
            arrays = tuple(
                Array(dtype, tuple(map(int, filter(None, shape.split(",")))))
                for dtype, shape in ARRAY.findall(re.sub(r"\{.*?\}", "", result))
            )
            if started and kind != "all-reduce":  # operands, results, contexts
                arrays = tuple(array for array in arrays if array != CONTEXT)
                arrays = arrays[len(arrays) // 2 :]
            collective = Collective(kind, arrays, times)
            channel = CHANNEL.search(rest)
            if fusion and channel:
                known = fused.setdefault((kind, channel[1]), collective)
                fused[kind, channel[1]] = min(known, collective, key=lambda one: one.times)
            else:
                collectives.append(collective)
        for loop in LOOP.finditer(body):
            visit(loop[2], times * _length(loop[0], bodies.get(loop[1], "")), fusion)
        for called in APPLIED.findall(body):
            visit(called, times, fusion)
        for called in FUSED.findall(body):
            visit(called, times, True)
        for branches in BRANCHES.findall(body):
            for branch in branches.replace("%", "").split(", "):
                visit(branch, times, fusion)

    visit(entry, 1, False)
    return [*collectives, *fused.values()]


def _length(loop: str, condition: str) -> int:
    """How often a loop is gone through: it says so, or compares its counter with a constant."""
    if said := LENGTH.search(loop):
        return int(said[1])
    compared = re.search(r"ROOT .* compare\(.*%(\S+?)\), direction=LT", condition)
    if compared is None:
        return 1
    constant = re.search(rf"%{re.escape(compared[1])} = .* constant\((\d+)\)", condition)
    return int(constant[1]) if constant else 1
