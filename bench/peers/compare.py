"""Widehead beside other libraries on a CPU suite, problem by problem, in one run.

    pip install torch onnxruntime onnx "mlx[cpu]" onednn ggml-python threadpoolctl    # what is missing is written down as refused
    python bench/peers/compare.py cpu-prefill cpu-decode --build build --json FILE --markdown FILE

Every library runs in a process of its own, on the same problem right after Widehead, so that a slow moment of the
machine meets both. Times are the best of the samples in which the process was not preempted; Widehead's come from
`widehead bench`, which also guards them with a probe of the multiply-add rate. Those without a single undisturbed sample are marked ~.
OpenBLAS takes its kernels for an older CPU than some it runs on: what multiplies with it runs again with each of --openblas-cores.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = ("torch f32", "torch bf16", "onnxruntime Attention f32",
             "onnxruntime GroupQueryAttention f32", "mlx f32", "onednn f32", "onednn bf16", "ggml f32", "ggml f16")
PLAIN_FIELDS = {"batch", "heads", "dim", "queries", "keys", "dtype", "layout"}


def expanded(row):
    """The rows that lists in a row's fields stand for."""
    names = [name for name, value in row.items() if isinstance(value, list)]
    for values in itertools.product(*(row[name] for name in names)):
        one = row | dict(zip(names, values))
        if isinstance(one["queries"], dict):
            one["queries"] = min(one["keys"], one["queries"].get("at_most", one["keys"]))
        yield one


def problem_of(row, threads):
    """What peer.py reads: `features` names all that a library must be able to do beyond the plain problem."""
    heads = [int(x) for x in row["heads"].split("/")]
    dims = [int(x) for x in str(row["dim"]).split("/")]
    problem = dict(batch=row.get("batch", 1), heads_q=heads[0], heads_kv=heads[-1], len_q=row["queries"],
                   len_k=row["keys"], dim_qk=dims[0], dim_v=dims[-1], threads=threads,
                   features=[name for name in row if name not in PLAIN_FIELDS])
    if row.get("causal", "bottom-right") != "bottom-right":
        problem["features"].append("top-left causal")
    if "window" in row:
        problem["window"] = [int(x) for x in row["window"].split(",")]
    if "kv-dtype" in row:
        problem["kv_dtype"] = row["kv-dtype"]
    return problem | {name: row[name] for name in ("softcap", "mask") if name in row}


def openblas_cores():
    flags = Path("/proc/cpuinfo").read_text()
    return ["SkylakeX"] if " avx512f " in flags else ["Haswell", "Zen"] if " avx2 " in flags else []


def widehead_rows(build, row, dtype, seconds, extra=(), core=None):
    flags = []
    for name, value in (row | {"dtype": dtype}).items():
        flags += [f"--{name}={str(value).lower() if isinstance(value, bool) else value}"]
    result = subprocess.run(
        [f"{build}/cli/widehead", "bench", *flags, *extra, "--seconds", str(seconds), "--samples", "400",
         "--json"], capture_output=True, text=True, check=True, env=environment_of(core))
    return json.loads(result.stdout)


def merged(machine, document):
    """The machine as all runs saw it: its best rates, as cores are shared now and then."""
    best = {key: max(machine.get(key, 0), document[key]) for key in ("multiply_add_gflops", "read_gbytes_per_s")}
    return {key: document[key] for key in ("device", "isa", "threads", "blas")} | best


def environment_of(core):
    return dict(os.environ, OPENBLAS_CORETYPE=core) if core else dict(os.environ)


def run_peer(python, library, problem, seconds, core=None):
    request = json.dumps({"library": library, "problem": problem, "seconds": seconds})
    environment = dict(environment_of(core), OMP_NUM_THREADS=str(problem["threads"]))
    result = subprocess.run([python, HERE / "peer.py"], input=request, capture_output=True, text=True,
                            env=environment)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        return {"refused": lines[-1] if lines else f"ended by signal {-result.returncode}"}
    return json.loads(result.stdout.splitlines()[-1])


def cell(result):
    if "refused" in result:
        return "refused"
    times = f"{result['best_us'] / 1e3:.3g} ({result['median_us'] / 1e3:.3g})"
    return times + ("" if result.get("guarded", True) else " ~")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="+")
    parser.add_argument("--build", default="build")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument("--seconds", type=float, default=3, help="for each library and problem")
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES)
    parser.add_argument("--openblas-cores", nargs="*", default=openblas_cores(),
                        help="values of OPENBLAS_CORETYPE beside OpenBLAS's own choice (the best of this CPU)")
    parser.add_argument("--json")
    parser.add_argument("--markdown")
    options = parser.parse_args()
    suites = json.loads((HERE.parent / "suites.json").read_text())
    threads = os.cpu_count()
    rows, machine = [], {}
    for suite in options.suites:
        for row in (one for group in suites[suite]["rows"] for one in expanded(group)):
            problem = problem_of(row, threads)
            results = {}
            # Over a cache of another type queries are f32, as ggml's are.
            for dtype in ("f32",) if "kv-dtype" in row else ("f32", "bf16", "f16"):
                extra = ("--against", "unfused") if dtype == "f32" and "kv-dtype" not in row else ()
                document = widehead_rows(options.build, row, dtype, options.seconds, extra)
                machine = merged(machine, document)
                for found in document["rows"]:
                    name = "unfused f32" if found["kernel"] == "cpu_unfused" else f"widehead {dtype}"
                    results[name] = found
            for library in options.libraries:
                results[library] = run_peer(options.python, library, problem, options.seconds)
            for core in options.openblas_cores:
                if "openblas" in machine["blas"].lower():
                    found = widehead_rows(options.build, row, "f32", options.seconds,
                                          ("--kernel", "cpu_unfused"), core)
                    results[f"unfused f32, {core}"] = found["rows"][0] | {"blas": found["blas"]}
                for library in options.libraries:
                    if "openblas" in " ".join(results[library].get("blas", [])).lower():
                        results[f"{library}, {core}"] = run_peer(options.python, library, problem,
                                                                 options.seconds, core)
            rows.append(dict(suite=suite, **problem, results=results))
            name = f"{row['heads']} d{row['dim']} {row['queries']} x {row['keys']}"
            print(name, {key: cell(value) for key, value in results.items()}, file=sys.stderr, flush=True)
    names = list(dict.fromkeys(name for row in rows for name in row["results"]))
    lines = [f"{machine['device']}, {machine['threads']} threads, {machine['isa']}: multiply-adds "
             f"{machine['multiply_add_gflops']:.0f} GFLOP/s, reads {machine['read_gbytes_per_s']:.1f} GB/s. "
             f"Best milliseconds (median); ~ disturbed. Unfused: {machine['blas']}.", "",
             "| heads, dim, queries x keys | " + " | ".join(names) + " | f32 x best peer | bf16 x torch |",
             "|---" * (3 + len(names)) + "|"]
    for row in rows:
        results = row["results"]
        dims = f"{row['dim_qk']}" + (f"/{row['dim_v']}" if row["dim_v"] != row["dim_qk"] else "")
        peers = [result["best_us"] for name, result in results.items()
                 if not name.startswith(("widehead", "unfused")) and " f32" in name and "best_us" in result]
        ratio = f"{min(peers) / results['widehead f32']['best_us']:.2f}" if peers else "-"
        torch16 = results.get("torch bf16", {}).get("best_us")
        ratio16 = f"{torch16 / results['widehead bf16']['best_us']:.2f}" if torch16 else "-"
        lines.append(f"| {row['heads_q']}/{row['heads_kv']}, {dims}, {row['len_q']} x {row['len_k']}"
                     f"{''.join(' ' + row.get('kv_dtype', '') if feature == 'kv-dtype' else ' ' + feature for feature in row['features'])} | "
                     + " | ".join(cell(results[name]) if name in results else "-" for name in names) + f" | {ratio} | {ratio16} |")
    versions = sorted({f"{name}: {result['version']}, {result['backend']}, BLAS {'; '.join(result['blas']) or 'none'}"
                       for row in rows for name, result in row["results"].items() if "version" in result})
    lines += ["", *(f"- {version}" for version in versions)]
    table = "\n".join(lines)
    print(table)
    if options.markdown:
        Path(options.markdown).write_text(table + "\n")
    if options.json:
        Path(options.json).write_text(json.dumps(dict(**machine, versions=versions, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
