"""Breaks the code on purpose, one place at a time, and tells which breaks the tests notice.

    python tests/mutate.py --count 60 --seed 14 [--slow]

Each mutant changes one place (an operator, a constant, an index, an order) in a copy of the tree
and runs the tests of that file there, until the first failure. The places are drawn by the seed.
"""

import argparse
import ast
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The test files that a mutant of a file has to get past.
TESTS = {
    "encoder.py": "golden sound oracle configurations bad_input limits",
    "adapter.py": "golden oracle generation fast configurations",
    "qwen3.py": "golden oracle generation fast loading",
    "sample.py": "generation golden command_line bad_input",
    "moss_min.py": "golden generation fast command_line limits bad_input configurations"
    " first_mistakes",
    "tools/batch.py": "batch",
    "tools/bench.py": "bench",
    "tools/common.py": "train evaluate batch make_tiny whole_files",
    "tools/compose.py": "make_tiny",
    "tools/decoding.py": "decoding parity",
    "tools/diagnose.py": "parity decoding damaged_dumps",
    "tools/evaluate.py": "evaluate",
    "tools/lora.py": "train",
    "tools/make_tiny.py": "make_tiny",
    "tools/mistakes.py": "parity decoding damaged_dumps",
    "tools/parity.py": "parity decoding damaged_dumps",
    "tools/stages.py": "parity decoding damaged_dumps",
    "tools/train.py": "train",
    "tools/voices.py": "make_tiny",
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}


def order_matters(call: ast.Call) -> bool:
    if len(call.args) != 2 or ast.dump(call.args[0]) == ast.dump(call.args[1]):
        return False
    return getattr(call.func, "id", "") not in ("min", "max", "require")


def changes(tree: ast.AST) -> list:
    """Returns (line, what is changed, a function that changes it) for every place in a file."""
    places = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
            other = OPERATORS[type(node.op)]
            places.append(
                (node.lineno, f"{type(node.op).__name__} to {other.__name__}", node, other)
            )
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
            other = OPERATORS[type(node.ops[0])]
            said = f"{type(node.ops[0]).__name__} to {other.__name__}"
            places.append((node.lineno, said, node, other))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            places.append((node.lineno, f"{node.value} changed", node, None))
        elif isinstance(node, ast.Call) and order_matters(node):
            places.append((node.lineno, "two arguments exchanged", node, None))
        elif isinstance(node, ast.If):
            places.append((node.lineno, "a condition turned round", node, None))
    return places


def apply(node: ast.AST, other: type | None) -> None:
    if isinstance(node, ast.BinOp | ast.BoolOp):
        node.op = other()
    elif isinstance(node, ast.Compare):
        node.ops[0] = other()
    elif isinstance(node, ast.Constant):
        node.value = not node.value if type(node.value) is bool else node.value + 1
    elif isinstance(node, ast.Call):
        node.args.reverse()
    else:
        node.test = ast.UnaryOp(ast.Not(), node.test)


def run_tests(tree: Path, names: str, slow: bool) -> str:
    """Returns the first failure's line, or nothing where all tests pass."""
    files = [f"tests/test_{name}.py" for name in names.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    try:
        run = subprocess.run(
            command + ["--slow"] * slow, cwd=tree, capture_output=True, text=True, timeout=900
        )
    except subprocess.TimeoutExpired:
        return "it took more than 15 minutes"
    if run.returncode == 0:
        return ""
    lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0] if lines else f"pytest ended with {run.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=14)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutants, from 1")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    caught = 0
    numbers = args.only or range(1, args.count + 1)
    for number in range(1, args.count + 1):
        name = rng.choice(list(TESTS))
        source = (ROOT / name).read_text("utf-8")
        tree = ast.parse(source)
        line, said, node, other = rng.choice(changes(tree))
        if number not in numbers:
            continue
        apply(node, other)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "tree"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"))
            (copy / name).write_text(ast.unparse(ast.fix_missing_locations(tree)), "utf-8")
            failure = run_tests(copy, TESTS[name], args.slow)
        caught += bool(failure)
        print(f"{number}. {name}:{line}, {said}: {failure or 'NOT NOTICED'}", flush=True)
        print(f"    {source.splitlines()[line - 1].strip()}", flush=True)
    print(f"{caught} of {len(numbers)} were noticed")


if __name__ == "__main__":
    main()
