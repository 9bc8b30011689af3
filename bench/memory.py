"""How much memory the problems of CPU suites take: what was planned beside what the process held.

    python bench/memory.py cpu-prefill cpu-decode scaling --build build --write docs/planner.md

Every problem runs in a process of its own. `widehead run --json` counts what the process holds at
the most, less what it held before there were tensors. --write puts the table between the two
markers in that file.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from peers.compare import expanded

HERE = Path(__file__).parent
BEGIN, END = "<!-- bench/memory.py begins -->", "<!-- bench/memory.py ends -->"


def widehead(build: str, verb: str, row: dict, kernel: str) -> dict:
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in row.items()]
    if kernel:
        flags.append(f"--kernel={kernel}")
    command = [f"{build}/cli/widehead", verb, *flags, "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(result.args)}: {result.stderr.strip()}")
    return json.loads(result.stdout)


def size(count: int) -> str:
    if abs(count) < 1 << 20:
        return f"{count / (1 << 10):.0f} KiB"
    return f"{count / (1 << 20):.2f} MiB"


def lines_of(rows: list[dict], kernels: list[str], options: argparse.Namespace) -> Iterator[str]:
    """A line of the table for each problem and kernel; the largest difference of each kernel."""
    worst: dict[str, int] = {}
    for row in rows:
        for kernel in kernels:
            plan = widehead(options.build, "plan", row, kernel)
            if plan["estimated_us"] > options.seconds * 1e6:
                continue
            run = widehead(options.build, "run", row, kernel)
            name, tensors, planned = run["kernel"], run["tensor_bytes"], run["workspace_bytes"]
            peak = run["peak_resident_bytes"]
            difference = peak - tensors - planned
            worst[name] = max(worst.get(name, 0), abs(difference))
            yield (f"| {run['problem']} | {name} | {size(tensors)} | {size(planned)} "
                   f"| {size(peak)} | {size(difference)} |")
    largest = ", ".join(f"{name} {size(count)}" for name, count in worst.items())
    yield ""
    yield f"The largest difference: {largest}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="+")
    parser.add_argument("--build", default="build")
    parser.add_argument("--against", nargs="*", default=[],
                        help="kernels beside the planner's choice")
    parser.add_argument("--seconds", type=float, default=10, help="skip runs estimated longer")
    parser.add_argument("--write", type=Path, help="a file with the two markers")
    options = parser.parse_args()
    suites = json.loads((HERE / "suites.json").read_text())
    rows = [one for suite in options.suites for group in suites[suite]["rows"]
            for one in expanded(group)]
    device = widehead(options.build, "plan", rows[0], "")["device"]
    table = [
        f"{device}, {date.today()}, `python bench/memory.py {' '.join(options.suites)}"
        + (f" --against {' '.join(options.against)}" if options.against else "") + "`:", "",
        "| problem | kernel | tensors | plan | peak | difference |", "|---|---|---|---|---|---|"
    ]
    for line in lines_of(rows, ["", *options.against], options):
        print(line, file=sys.stderr)
        table.append(line)
    text = "\n".join(table)
    if options.write is None:
        print(text)
        return
    page = options.write.read_text()
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
