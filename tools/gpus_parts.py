"""The parts of tools/gpus_check."""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_parts import ROOT, GpuCheck, Json, Outcome, all_passed, missing, parse

# At so many ranks a problem should run so many times as fast as on one.
PREFILL_EFFICIENCY, DECODE_SPEEDUP_AT_4 = 0.9, 2.5
REGRET = {"median": 1.02, "worst": 1.10}
SECONDS_OF_A_ROW = 5  # with less left nothing is begun


@dataclass
class Figure:
    """A problem, in the words of the command line."""

    name: str
    words: str
    is_decode: bool = False
    rows: list[Json] = field(default_factory=list)  # of each number of ranks
    one: Json = field(default_factory=dict)  # on one device; empty: not measured

    @property
    def one_us(self) -> float:
        return float(self.one.get("best_us", 0))


# The most telling first: what the time does not suffice for is left out from the end.
FIGURES = [
    Figure("prefill-131072-d256", "--heads 64/2 --dim 256 --queries 131072 --causal"),
    Figure("prefill-131072-d128", "--heads 32/8 --dim 128 --queries 131072 --causal"),
    Figure("chunk-2048-of-524288-d256",
           "--heads 64/2 --dim 256 --queries 2048 --keys 524288 --causal"),
    Figure("decode-524288-d256", "--heads 64/2 --dim 256 --queries 1 --keys 524288", is_decode=True),
    Figure("decode-524288-d512", "--heads 32/4 --dim 512 --queries 1 --keys 524288", is_decode=True),
    Figure("prefill-32768-d512", "--heads 32/4 --dim 512 --queries 32768 --causal"),
    Figure("chunk-2048-of-524288-d128",
           "--heads 32/8 --dim 128 --queries 2048 --keys 524288 --causal"),
    Figure("window-131072-d256",
           "--heads 64/2 --dim 256 --queries 131072 --causal --window 4095,0"),
    Figure("prefill-32768-d192", "--heads 32/4 --dim 192/128 --queries 32768 --causal"),
]
# The same code with threads for GPUs, small enough for a test of this script.
SMALL_FIGURES = [
    Figure("prefill-512-d64", "--heads 4/2 --dim 64 --queries 512 --causal --threads 1"),
    Figure("decode-8192-d64", "--heads 4/2 --dim 64 --queries 1 --keys 8192 --threads 1", is_decode=True),
]


def nccl_folders() -> list[str]:
    """Where libnccl.so.2 may be beside what the loader knows: the toolkit's, a Python package's."""
    found = subprocess.run(
        [sys.executable, "-c", "import nvidia.nccl; print(list(nvidia.nccl.__path__)[0] + '/lib')"],
        capture_output=True, text=True)
    return [one for one in ("/usr/local/cuda/lib64", found.stdout.strip())
            if one and Path(one, "libnccl.so.2").exists()]


class GpusCheck(GpuCheck):
    def __init__(self, build: Path, results: Path, device: str, seconds: float,
                 ranks: list[int]) -> None:
        super().__init__(build, build, results, device, seconds)
        self.ranks = ranks
        self.figures = FIGURES if self.is_gpu else SMALL_FIGURES
        self.transport = "nccl" if self.is_gpu else "threads"
        self.link: dict[int, Json] = {}
        self.environment["LD_LIBRARY_PATH"] = ":".join(
            [self.environment["LD_LIBRARY_PATH"], *nccl_folders()])
        # Multicast can take the GPUs of a host away from everybody on it.
        self.environment.setdefault("NCCL_NVLS_ENABLE", "0")
        self.folder = Path(f"{self.stem}-gpus")
        self.folder.mkdir(parents=True, exist_ok=True)

    def widehead(self, words: str, seconds: float) -> tuple[Json | None, str]:
        """What a call prints, and what went wrong."""
        done = self.run([self.cli, *words.split(), "--device", self.device, "--json"], seconds)
        document = parse(done.out)
        return document, "" if done.code == 0 and document is not None else (
            f"widehead {words}: {done.why()}")

    # The parts.

    def links(self, seconds: float) -> Outcome:
        outcome = Outcome(data=[])
        for ranks in self.ranks:
            words = f"tune --parallel {self.transport} --ranks {ranks}"
            document, failure = self.widehead(words, seconds / len(self.ranks))
            if failure or document is None:
                outcome.failures.append(failure)
                continue
            self.link[ranks] = document
            outcome.data.append(document)
        return outcome

    def tests(self, seconds: float, kernels: list[str] | None = None) -> Outcome:
        return all_passed(self.run_tests("widehead_nccl_tests", seconds))

    def figures_part(self, seconds: float) -> Outcome:
        """Every problem on one device, then every strategy on every number of ranks."""
        outcome, end = Outcome(), time.monotonic() + seconds
        if not self.is_gpu:  # whose problems are small: those for GPUs must be words that plan reads
            for figure in FIGURES:
                _, failure = self.widehead(f"plan {figure.words} --dtype bf16 --ranks 4 --link "
                                           "400GB/s,5us", end - time.monotonic())
                outcome.failures += [failure] if failure else []
        left_out = []
        for figure in self.figures:
            if end - time.monotonic() < SECONDS_OF_A_ROW:
                left_out.append(f"{figure.name} on one")
            else:
                self.measure_alone(figure, end, outcome)
            for ranks in self.ranks:
                if not figure.one_us or end - time.monotonic() < SECONDS_OF_A_ROW:
                    left_out.append(f"{figure.name} on {ranks}")
                else:
                    self.measure_ranks(figure, ranks, end, outcome)
            self.write_figures()
        outcome.data = self.judge() | {"left_out": left_out}
        if left_out:
            print(f"         left out: {', '.join(left_out)}", flush=True)
        if self.is_gpu:
            outcome.failures += outcome.data["missed"]
        return outcome

    def measure_alone(self, figure: Figure, end: float, outcome: Outcome) -> None:
        begin = time.monotonic()
        one, failure = self.widehead(f"run {figure.words} --dtype bf16", end - begin)
        if failure or one is None:
            outcome.failures.append(failure)
            return
        figure.one = one
        self.say(f"{figure.name} on one: {one['best_us'] / 1e3:.4g} ms, "
                 f"{one['kernel']}", begin)

    def measure_ranks(self, figure: Figure, ranks: int, end: float, outcome: Outcome) -> None:
        begin = time.monotonic()
        words = (f"run {figure.words} --dtype bf16 --parallel {self.transport} "
                 f"--ranks {ranks} --every-strategy")
        row, failure = self.widehead(words, end - begin)
        if failure:
            outcome.failures.append(failure)
        if row is None:
            return
        figure.rows.append(row | {"name": figure.name, "one_us": figure.one_us,
                                  "one_kernel": figure.one["kernel"],
                                  "one_relative_rms": figure.one["relative_rms"]})
        best = chosen(row)
        self.say(f"{figure.name} on {ranks}: {best['best_us'] / 1e3:.4g} ms, {best['strategy']}, "
                 f"{figure.one_us / best['best_us']:.2f} times as fast", begin)

    @staticmethod
    def say(text: str, begin: float) -> None:
        print(f"         {text} ({time.monotonic() - begin:.0f} s)", flush=True)

    def timelines(self, seconds: float) -> Outcome:
        """What the planner expects of the ranks when, over the link as it was measured."""
        outcome = Outcome(data=[])
        for figure in self.figures:
            for ranks in self.ranks:
                if ranks not in self.link:
                    continue
                link = self.link[ranks]
                path = self.folder / f"{figure.name}-{ranks}-timeline.svg"
                _, failure = self.widehead(
                    f"plan {figure.words} --dtype bf16 --ranks {ranks} --link "
                    f"{link['gbytes_per_s']}GB/s,{link['latency_us']}us --timeline {path}", seconds)
                if failure:
                    outcome.failures.append(failure)
                else:
                    outcome.data.append(path.name)
        if not outcome.data:
            outcome.failures.append("no timeline was drawn")
        return outcome

    def chart(self, _: float) -> Outcome:
        try:
            import matplotlib
        except ImportError:
            return missing("no matplotlib")
        matplotlib.use("svg")
        from matplotlib import pyplot

        _, axes = pyplot.subplots(figsize=(9, 5))
        for figure in self.figures:
            points = [(row["ranks"], row["one_us"] / chosen(row)["best_us"]) for row in figure.rows]
            if points:
                axes.plot(*zip((1, 1.0), *points), marker="o", label=figure.name)
        most = max(self.ranks)
        axes.plot((1, most), (1, most), color="grey", linestyle=":", label="ideal")
        axes.set_xticks([1, *self.ranks])
        axes.set_xlabel("GPUs" if self.is_gpu else "threads")
        axes.set_ylabel("times as fast as one, by the planner's strategy")
        axes.set_title(str(self.facts["name"]))
        axes.legend(fontsize=7)
        path = self.folder / "speedup.svg"
        pyplot.savefig(path, metadata={"Date": None})
        return Outcome(data=path.name)

    def peers(self, seconds: float) -> Outcome:
        """PyTorch's context_parallel on the same problems."""
        if subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode:
            return missing("no PyTorch")
        outcome, most = Outcome(data=[]), max(self.ranks)
        path = self.scratch / "peers.json"
        # It ends by itself, and torchrun takes time to load before it: torchrun's processes are no
        # longer ours when torchrun is killed.
        its_own = max(1, int(min(seconds, self.left())) - 12)
        done = self.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                         "--nproc-per-node", most, ROOT / "bench" / "gpus_peers.py", path, its_own],
                        seconds)
        rows = json.loads(path.read_text()) if path.exists() else []
        for row in rows:
            print(f"         {json.dumps(row)}", flush=True)
        if done.code != 0 or not rows:
            outcome.failures.append(f"{len(rows)} rows were written: {done.why()}")
        outcome.data = rows
        return outcome

    # What they share.

    def judge(self) -> Json:
        """Efficiencies, and what the planner lost by its choices."""
        rows = [row for figure in self.figures for row in figure.rows]
        decodes = {figure.name for figure in self.figures if figure.is_decode}
        missed, regrets = [], []
        for row in rows:
            best = min(row["strategies"], key=lambda one: one["best_us"])
            regrets.append(chosen(row)["best_us"] / best["best_us"])
            speedup = row["one_us"] / chosen(row)["best_us"]
            goal = (DECODE_SPEEDUP_AT_4 * row["ranks"] / 4 if row["name"] in decodes
                    else PREFILL_EFFICIENCY * row["ranks"])
            if row["ranks"] == 4 and speedup < goal:
                missed.append(f"{row['name']} is {speedup:.2f} times as fast on 4, the goal is "
                              f"{goal:.2f}")
        judged: Json = {"rows": len(rows), "missed": missed}
        if regrets:
            judged |= {"median_regret": statistics.median(regrets), "worst_regret": max(regrets)}
            for name, most in REGRET.items():
                if judged[f"{name}_regret"] > most:
                    missed.append(f"{name} regret is {judged[f'{name}_regret']:.3f}, the goal is "
                                  f"{most}")
        else:
            missed.append("nothing was measured")
        return judged

    def write_figures(self) -> None:
        rows = [row for figure in self.figures for row in figure.rows]
        document = {"device": self.facts, "links": self.link, "rows": rows}
        Path(f"{self.stem}-gpus.json").write_text(json.dumps(document, indent=1) + "\n")
        lines = [f"# {self.facts['name']}: attention over several", "",
                 "bf16, times in ms, the planner's strategy in bold; in brackets times as fast as "
                 "one device.", "",
                 "| problem | ranks | one | " + " | ".join(STRATEGIES) + " |",
                 "|" + "---|" * (3 + len(STRATEGIES))]
        for row in rows:
            cells = [row["problem"], str(row["ranks"]), f"{row['one_us'] / 1e3:.4g}"]
            found = {one["strategy"]: one for one in row["strategies"]}
            for strategy in STRATEGIES:
                if strategy not in found:
                    cells.append("-")
                    continue
                us = found[strategy]["best_us"]
                text = f"{us / 1e3:.4g} ({row['one_us'] / us:.2f})"
                cells.append(f"**{text}**" if strategy == row["chosen"] else text)
            lines.append("| " + " | ".join(cells) + " |")
        Path(f"{self.stem}-gpus.md").write_text("\n".join(lines) + "\n")


STRATEGIES = ("ring", "gather", "heads", "queries", "one_rank")


def chosen(row: Json) -> Json:
    return next(one for one in row["strategies"] if one["strategy"] == row["chosen"])
