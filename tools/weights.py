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
from common import our_name, read_names
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
    values = 0.0
    magnitudes = 0.0
    by_index = 0.0
    start = 0
    for block in tensor.reshape(-1).split(BLOCK):
        x = block.double()
        values += float(x.sum())
        magnitudes += float(x.abs().sum())
        by_index += float(x @ torch.arange(start, start + len(x), dtype=torch.float64))
        start += len(x)
    return Sums([*tensor.shape], values, magnitudes, by_index)


def distance(theirs: Sums, ours: Sums) -> float:
    """Returns the largest difference of two sums, over the sum of the magnitudes."""
    last = max(1, math.prod(ours.shape) - 1)
    off = [abs(theirs.values - ours.values), abs(theirs.magnitudes - ours.magnitudes)]
    off.append(abs(theirs.by_index - ours.by_index) / last)
    worst = max(off) / (ours.magnitudes or 1.0)
    return worst if math.isfinite(worst) else math.inf


def what_was_read(theirs: Sums, tensor: Tensor) -> str:
    """Returns in words what a port's sums are those of, if not of the tensor."""
    off = distance(theirs, sums(tensor))
    if off <= PASSES:
        return f"it has the shape {theirs.shape}, expected {[*tensor.shape]}"
    for one, other in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        if tensor.dtype == one and distance(theirs, sums(tensor.view(other))) <= PASSES:
            return f"{one} was read as {other}".replace("torch.", "")
    if distance(theirs, sums(tensor.flatten(1).T if tensor.ndim > 1 else tensor)) <= PASSES:
        return "it is transposed: its values are stored column by column"
    if distance(theirs._replace(by_index=sums(tensor).by_index), sums(tensor)) <= PASSES:
        return "its values are the right ones in another order"
    return f"its sums are off by {off:.1e} of the magnitudes"


def read_port(path: Path, map_path: str | None) -> dict[str, Sums]:
    """Returns a port's sums by our names. map_path: the file of --names."""
    names = read_names(map_path)
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    require(isinstance(entries, dict), f"{path}: expected an object, as --json prints it")
    found = {}
    for theirs, entry in entries.items():
        name = our_name(theirs, names)
        require(name not in found, f"{path}: two of its tensors are {name}, by --names")
        try:
            shape = [int(size) for size in entry["shape"]]
            found[name] = Sums(shape, *[float(entry[key]) for key in Sums._fields[1:]])
        except (KeyError, TypeError, ValueError) as error:
            keys = ", ".join(Sums._fields)
            said = f"{path}: {theirs} is {entry!r:.60}; expected an object of {keys}"
            raise ValueError(said) from error
    return found


def run(args: argparse.Namespace) -> int:
    """Prints a checkpoint's sums, or which of a port's differ; returns 1 if some do."""
    port = read_port(Path(args.port), args.names) if args.port else None
    tensors = {}
    for shard in map_shards(Path(args.folder)).values():
        tensors |= shard
    if port is not None:
        return compare(tensors, port, args)
    ours = {name: sums(tensor) for name, tensor in sorted(tensors.items())}
    if args.json:
        print(json.dumps({name: entry._asdict() for name, entry in ours.items()}, indent=1))
        return 0
    form = "{:66} {:16} {:>18} {:>18} {:>18}"
    print(form.format("tensor", *Sums._fields))
    for name, entry in ours.items():
        figures = [f"{x:.11e}" for x in entry[1:]]
        print(form.format(name, "x".join(map(str, entry.shape)), *figures))
    return 0


def compare(tensors: dict[str, Tensor], port: dict[str, Sums], args: argparse.Namespace) -> int:
    wrong = {}
    shared = [name for name in sorted(tensors) if name in port]
    found = f"none of its {len(port)} tensors ({', '.join([*port][:3])}) has a name of the folder's"
    require(shared, f"{args.port}: {found}; expected some like {min(tensors)}, or --names")
    for name in shared:
        ours = sums(tensors[name])
        if port[name].shape != ours.shape or distance(port[name], ours) > PASSES:
            wrong[name] = what_was_read(port[name], tensors[name])
    missing = [name for name in sorted(tensors) if name not in port]
    unknown = [name for name in port if name not in tensors]
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
