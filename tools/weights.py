"""Whether a port has read a checkpoint's weights right: the shape and three sums of every tensor.

    python tools/parity.py weights FOLDER [PORT.json] [--json] [--names MAP.json]

The sums, in float64, are those of the values, of their magnitudes, and of each value times its
row-major index from 0. --json prints {"name": {"shape": [...], "values": x, "magnitudes": x,
"by_index": x}, ...}, and PORT.json holds a port's in that format, all or some of them.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import our_name, read_names, read_object
from encoder import require
from moss_min import map_shards

# What passes, over the sum of the magnitudes. Float64 sums in another order differ by 1e-12; a port
# that holds the weights in float16 loses the smallest values, which are 1e-8.
PASSES = 1e-6
BLOCK = 1 << 22  # values in float64 at a time


class Sums(NamedTuple):
    shape: list[int]
    values: float
    magnitudes: float
    by_index: float


def sums(tensor: Tensor) -> Sums:
    total = torch.zeros(3, dtype=torch.float64)
    start = 0
    for block in tensor.reshape(-1).split(BLOCK):
        x = block.double()
        index = torch.arange(start, start + len(x), dtype=torch.float64)
        total += torch.stack([x.sum(), x.abs().sum(), x @ index])
        start += len(x)
    return Sums([*tensor.shape], *total.tolist())


def distance(theirs: Sums, ours: Sums) -> float:
    """Returns the largest difference of two sums, over the sum of the magnitudes."""
    last = max(1, math.prod(ours.shape) - 1)
    off = [abs(theirs.values - ours.values), abs(theirs.magnitudes - ours.magnitudes)]
    off.append(abs(theirs.by_index - ours.by_index) / last)
    worst = max(off) / (ours.magnitudes or 1.0)
    return worst if math.isfinite(worst) else math.inf


def what_was_read(theirs: Sums, tensor: Tensor) -> str | None:
    """Returns in words what a port's sums are those of, if not of the tensor."""
    ours = sums(tensor)
    off = distance(theirs, ours)
    if off <= PASSES:
        misshaped = f"it has the shape {theirs.shape}, expected {ours.shape}"
        return None if theirs.shape == ours.shape else misshaped
    for one, other in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        if tensor.dtype == one and distance(theirs, sums(tensor.view(other))) <= PASSES:
            return f"{one} was read as {other}".replace("torch.", "")
    if tensor.ndim > 1 and distance(theirs, sums(tensor.flatten(1).T)) <= PASSES:
        return "it is transposed: its values are stored column by column"
    if distance(theirs._replace(by_index=ours.by_index), ours) <= PASSES:
        return "its values are the right ones in another order"
    return f"its sums are off by {off:.1e} of the magnitudes"


def read_port(path: Path, map_path: str | None) -> dict[str, Sums]:
    """Returns a port's sums by our names. map_path: the file of --names."""
    names = read_names(map_path)
    found = {}
    for theirs, entry in read_object(path, "as --json prints it").items():
        name = our_name(theirs, names)
        require(name not in found, f"{path}: two of its tensors are {name}, by --names")
        try:
            figures = [float(entry[key]) for key in Sums._fields[1:]]
            found[name] = Sums(list(entry["shape"]), *figures)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            keys = ", ".join(Sums._fields)
            said = f"{path}: {theirs} is {entry!r:.60}; expected an object of {keys}"
            raise ValueError(said) from error
    return found


def show(ours: dict[str, Sums]) -> None:
    form = "{:66} {:16} {:>18} {:>18} {:>18}"
    print(form.format("tensor", *Sums._fields))
    for name, entry in ours.items():
        figures = [f"{x:.11e}" for x in entry[1:]]
        print(form.format(name, "x".join(map(str, entry.shape)), *figures))


def run(args: argparse.Namespace) -> int:
    """Prints a checkpoint's sums, or which of a port's differ; returns 1 if some do."""
    port = read_port(Path(args.port), args.names) if args.port else None
    tensors = {}
    for shard in map_shards(Path(args.folder)).values():
        tensors |= shard
    if port is not None:
        return compare(dict(sorted(tensors.items())), port, args)
    ours = {name: sums(tensor) for name, tensor in sorted(tensors.items())}
    if args.json:
        print(json.dumps({name: entry._asdict() for name, entry in ours.items()}, indent=1))
    else:
        show(ours)
    return 0


def compare(tensors: dict[str, Tensor], port: dict[str, Sums], args: argparse.Namespace) -> int:
    """Prints which of a port's sums are not those of the tensors; returns 1 if some are not."""
    shared = [name for name in tensors if name in port]
    missing = [name for name in tensors if name not in port]
    unknown = [name for name in port if name not in tensors]
    found = f"none of its {len(port)} tensors ({', '.join(unknown[:3])}) has a name of the folder's"
    require(shared, f"{args.port}: {found}; expected some like {min(tensors)}, or --names")
    read = {name: what_was_read(port[name], tensors[name]) for name in shared}
    wrong = {name: means for name, means in read.items() if means}
    if args.json:
        answer = {"equal": not wrong, "compared": len(shared), "differ": wrong}
        print(json.dumps(answer | {"missing": missing, "unknown": unknown}))
        return int(bool(wrong))
    for name, means in wrong.items():
        print(f"{name} differs: {means}.")
    for where, names in (("the port's file", missing), ("the folder", unknown)):
        if names:
            more = ", ..." if len(names) > 3 else ""
            print(f"{len(names)} are not in {where}: {', '.join(names[:3])}{more}.")
    equal = f"Equal: no difference in any of the {len(shared)} tensors compared."
    print(f"{len(wrong)} of the {len(shared)} tensors compared differ." if wrong else equal)
    return int(bool(wrong))
