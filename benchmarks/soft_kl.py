"""Forward and backward of the softened KL: kdlab against eager PyTorch and torch.compile.

One thread is timed in CPU time of that thread, which a busy machine disturbs little; compare medians. Several threads
are timed by the wall clock, where a neighbour can stall a parallel region for milliseconds: compare the best of many.
Contenders take turns, and the order rotates from round to round. Every call gets a new gradient, as in training.
"""
import argparse
import csv
import datetime
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import kdlab as kd
from kdlab import _C

SHAPES = [(128, 10), (256, 100), (2048, 1000), (512, 32000), (128, 128256)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
T = 4.0
SAMPLE = 300e-6  # seconds: shorter calls are repeated until one sample lasts about this long


def eager(student, teacher):
    log_p, log_q = F.log_softmax(teacher / T, -1), F.log_softmax(student / T, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * T**2


def kdlab(student, teacher):
    return kd.functional.forward_kl(student, teacher, T=T)


def contenders(with_compile):
    "The functions to time by name; freshly compiled, because compiled code keeps the thread count that it first saw."
    torch._dynamo.reset()
    functions = {"kdlab": kdlab, "eager": eager}
    if with_compile:
        functions["compile"] = torch.compile(eager, dynamic=False)
    return functions


def sample(function, student, teacher, calls, clock):
    "Seconds for one forward and backward, averaged over `calls`."
    start = clock()
    for _ in range(calls):
        torch.autograd.grad(function(student, teacher), student)
    return (clock() - start) / calls


def measure(shape, dtype, threads, seconds, with_compile):
    "Samples in seconds, by contender."
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    torch.manual_seed(0)
    student, teacher = (torch.randn(shape).to(dtype) for _ in range(2))
    student.requires_grad_()
    functions = contenders(with_compile)
    calls = {}
    for name, function in functions.items():
        for _ in range(3):
            once = sample(function, student, teacher, 1, time.perf_counter)
        calls[name] = max(1, round(SAMPLE / once))
    names, samples = list(functions), {name: [] for name in functions}
    stop, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < stop or turn < 7:
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            samples[name].append(sample(functions[name], student, teacher, calls[name], clock))
        turn += 1
    return samples


def summary(samples):
    "Median, 10th percentile and best of each contender in microseconds."
    out = {}
    for name, times in samples.items():
        times = sorted(1e6 * t for t in times)
        out[name] = {"median_us": statistics.median(times), "p10_us": times[len(times) // 10], "best_us": times[0]}
    return out


def machine():
    "What the numbers depend on."
    info, cpu = _C.info(), platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        fields = dict(line.split(":", 1) for line in open("/proc/cpuinfo") if ":" in line)
        fields = {k.strip(): v.strip() for k, v in fields.items()}
        cpu = fields.get("model name", cpu)
        if "cpu family" in fields:
            cpu += f" (family {fields['cpu family']}, model {fields['model']})"
    return {"date": datetime.date.today().isoformat(), "cpu": cpu, "cores": os.cpu_count(), "isa": info["isa"],
            "compiler": info["compiler"], "python": platform.python_version(), "torch": torch.__version__,
            "kdlab": kd.__version__}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half a second for each row instead of four")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the logits (default: float32)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"), help="where the CSV goes")
    args = parser.parse_args()

    where, rows = machine(), []
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    for threads in args.threads:
        key = "median_us" if threads == 1 else "best_us"
        what = "CPU time, median (p10)" if threads == 1 else "wall time, best"
        print(f"\n{threads} thread(s), {args.dtype}, {what}, in us")
        for shape in SHAPES:
            seconds = 0.5 if args.quick else 4
            result = summary(measure(shape, DTYPES[args.dtype], threads, seconds, not args.no_compile))
            ours, cells = result["kdlab"][key], []
            for name, times in result.items():
                ratio = times[key] / ours
                p10 = f" ({times['p10_us']:.0f})" if threads == 1 else ""
                cells.append(f"{name} {times[key]:10.1f}{p10}" + ("" if name == "kdlab" else f" = {ratio:5.1f}x"))
                rows.append({**where, "rows": shape[0], "cols": shape[1], "dtype": args.dtype, "threads": threads,
                             "clock": "cpu" if threads == 1 else "wall", "contender": name,
                             **{k: round(v, 2) for k, v in times.items()}, "times_kdlab": round(ratio, 2)})
            print(f"{shape[0]:5d} x {shape[1]:<7d}", "   ".join(cells), flush=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
