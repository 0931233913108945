"""Forward and backward of the softened KL, alone and with cross-entropy: kdlab against eager PyTorch, torch.compile and
the machine's limits.

One thread is timed in CPU time of that thread, which a busy machine disturbs little; compare medians. Several threads
are timed by the wall clock, where a neighbour can stall a parallel region for milliseconds: compare the best of many.
Contenders take turns, and the order rotates from round to round. Each gradient is dropped before the next call, so that
kdlab recycles its memory; "fresh" frees that memory first. PyTorch pays for fresh pages in large tensors, so everything
is timed once more in a process whose heap keeps what is freed ("warm"). "close rows" is the function on a student that
has nearly converged; the other divergences are there by name, with their usual weights. The last table has every goal
of issue 3 beside what was reached. They are meant for AVX-512; below them is what a machine with less gets.

Without arguments it times what the goals need, in a few minutes. With any of --shape, --dtype, --threads and --isa: every
contender on every combination of them.
"""
import argparse
import csv
import ctypes
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import kdlab as kd
from kdlab import _C, ops

SHAPES = [(128, 10), (256, 1000), (2048, 1000), (512, 32000), (256, 128256)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
T, ALPHA = 4.0, 0.1
SAMPLE = 1e-3  # seconds: shorter calls are repeated until one sample lasts about this long
WARM_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}  # glibc

# What issue 3 asks for on one thread: shapes, dtype, heap, time, divided by time, at least or at most.
SMALL, MEDIUM, LARGE = [(128, 10)], [(256, 1000)], [(512, 32000), (256, 128256)]
GOALS = [
    (SMALL, "float32", "default", "eager", "function", ">=", 4.4),
    (SMALL, "float32", "default", "compile", "function", ">=", 3.6),
    (SMALL, "float32", "default", "function", "no-op", "<=", 1.25),
    (SMALL, "float32", "default", "module", "no-op", "<=", 1.35),
    (MEDIUM, "float32", "default", "eager", "function", ">=", 10),
    (MEDIUM, "float32", "default", "compile", "function", ">=", 6),
    (MEDIUM, "float32", "default", "function", "0.38 ns an element", "<=", 1),
    (LARGE, "float32", "default", "eager", "function", ">=", 45),
    (LARGE, "float32", "default", "compile", "function", ">=", 12),
    (LARGE, "float32", "default", "function", "plain triad", "<=", 1.05),
    (LARGE, "float32", "default", "function", "streaming triad", "<=", 1.3),
    (LARGE, "float32", "default", "eager", "fresh", ">=", 10),
    (LARGE, "float32", "default", "compile", "fresh", ">=", 2.8),
    (LARGE, "float32", "default", "fresh", "function", "<=", 1.7),
    (LARGE, "float32", "warm", "eager", "function", ">=", 13),
    (LARGE, "float32", "warm", "compile", "function", ">=", 6),
    (LARGE, "bfloat16", "default", "eager", "function", ">=", 20),
    (LARGE, "bfloat16", "default", "compile", "function", ">=", 9),
    (LARGE[:1], "float32", "default", "CE + KD eager", "CE + KD", ">=", 40),
    (LARGE[:1], "float32", "default", "CE + KD compile", "CE + KD", ">=", 12),
    (LARGE[:1], "float32", "default", "CE + KD", "function", "<=", 1.25),
    (MEDIUM, "float32", "default", "close rows", "function", "<=", 2),
    (LARGE, "float32", "default", "close rows", "function", "<=", 1.5),
]
FAMILY = ["reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "soft_cross_entropy"]
GOALS += [(shapes, "float32", "default", name, "function", "<=", 1.6) for shapes in (SMALL, MEDIUM, LARGE) for name in FAMILY]


class NoOp(torch.autograd.Function):
    "What a call costs before anything is computed."

    @staticmethod
    def forward(ctx, student, teacher):
        ctx.grad = torch.empty_like(student)
        return torch.empty(())

    @staticmethod
    def backward(ctx, grad_out):
        grad, ctx.grad = ctx.grad, None
        return grad, None


def eager_kd(student, teacher, target):
    log_p, log_q = F.log_softmax(teacher / T, -1), F.log_softmax(student / T, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * T**2


def eager_both(student, teacher, target):
    return ALPHA * F.cross_entropy(student, target) + (1 - ALPHA) * eager_kd(student, teacher, target)


def triads(student, teacher):
    "The two triads over as many bytes as the loss must move, or nothing where no compiler is found."
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    elements = student.nbytes // 4 // 64 * 64
    if compiler is None or elements < 1 << 20:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "triad.so"
        source = Path(__file__).with_name("triad.cpp")
        subprocess.run([compiler, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", source, "-o", library], check=True)
        code = ctypes.CDLL(str(library))
    out = torch.from_dlpack(_C.empty(tuple(student.shape), ops._CODES[student.dtype]))
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (out, student, teacher)]

    def call(name):
        return lambda: (getattr(code, name)(*pointers, ctypes.c_int64(elements), torch.get_num_threads()), out)[0]

    return {"plain triad": call("plain_triad")} | (
        {"streaming triad": call("streaming_triad")} if code.streaming_triad(*pointers, ctypes.c_int64(0), 1) else {})


def contenders(shape, dtype, heap, with_compile, only):
    """Functions that do one forward and backward, by name; freshly compiled, as compiled code keeps its thread count.
    All of them, or those in `only`."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    student, teacher = (torch.randn(shape).to(dtype) for _ in range(2))
    student.requires_grad_()
    target = torch.randint(shape[1], shape[:1])
    module = kd.SoftKL(T=T)
    both = ALPHA * kd.CrossEntropy() + (1 - ALPHA) * module
    compiled = (lambda f: torch.compile(f, dynamic=False)) if with_compile else None

    def fresh(*args):
        ops.empty_cache()
        return kd.functional.forward_kl(student, teacher, T=T)

    close = (teacher + 0.01 * torch.randn(shape)).to(dtype).requires_grad_()

    losses = {"function": lambda s, t, y: kd.functional.forward_kl(s, t, T=T), "eager": eager_kd}
    if with_compile:
        losses["compile"] = compiled(eager_kd)
    if heap == "default":
        losses |= {"module": lambda s, t, y: module(s, t), "no-op": lambda s, t, y: NoOp.apply(s, t), "CE + KD": both,
                   "CE + KD eager": eager_both}
        if with_compile:
            losses["CE + KD compile"] = compiled(eager_both)
        if shape in LARGE:
            losses["fresh"] = fresh
        for name in FAMILY:
            losses[name] = lambda s, t, y, f=getattr(kd.functional, name): f(s, t, T=T)
    run = lambda loss, student: lambda: torch.autograd.grad(loss(student, teacher, target), student)
    functions = {k: run(f, student) for k, f in losses.items()}
    if heap == "default":
        functions |= {"close rows": run(losses["function"], close)}
        if only is None or "plain triad" in only:
            functions |= triads(student, teacher)
    return {k: f for k, f in functions.items() if only is None or k in only}


def measure(shape, dtype, threads, heap, seconds, with_compile, only):
    "Median, 10th percentile and best of each contender in microseconds."
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    functions = contenders(shape, dtype, heap, with_compile, only)

    def sample(function, calls, clock):
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / calls

    calls = {}
    for name, function in functions.items():
        for _ in range(3):
            once = sample(function, 1, time.perf_counter)
        calls[name] = max(1, round(SAMPLE / once))
    names, samples = list(functions), {name: [] for name in functions}
    stop, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < stop or turn < 7:
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            samples[name].append(1e6 * sample(functions[name], calls[name], clock))
        turn += 1
    return {name: {"median_us": statistics.median(x), "p10_us": sorted(x)[len(x) // 10], "best_us": min(x)}
            for name, x in samples.items()}


def measure_in_own_process(**job):
    "`measure` in a new process, with the instruction set and the heap that the job asks for."
    environment = os.environ | {"KDLAB_ISA": job.pop("isa")} | (WARM_HEAP if job["heap"] == "warm" else {})
    done = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], env=environment, stdout=subprocess.PIPE,
                          text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


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


def report(job, result):
    "Print the times of one job; its goals and what was reached, as rows of the last table."
    rows, cols = job["shape"]
    key = "median_us" if job["threads"] == 1 else "best_us"
    time_of = {name: times[key] for name, times in result.items()} | {"0.38 ns an element": 0.38e-3 * rows * cols}
    print(f"\n{rows} x {cols}, {job['dtype']}, {job['isa']}, {job['threads']} thread(s), {job['heap']} heap: "
          + ("CPU time, median (p10)" if job["threads"] == 1 else "wall time, best"))
    for name, times in sorted(result.items(), key=lambda item: item[1][key]):
        p10 = f" ({times['p10_us']:.1f})" if job["threads"] == 1 else ""
        print(f"  {name:16s} {times[key]:11.1f} us{p10:14s} {times[key] / time_of['function']:7.2f} x function")
    if job["threads"] > 1:
        return []
    reached = []
    for shapes, dtype, heap, over, under, relation, bar in GOALS:
        if (rows, cols) in shapes and (dtype, heap) == (job["dtype"], job["heap"]) and {over, under} <= time_of.keys():
            ratio = time_of[over] / time_of[under]
            short = bar / ratio - 1 if relation == ">=" else ratio / bar - 1       # by how much the goal is missed
            state = "met" if short <= 0 else f"missed by {short:.0%}"
            reached.append(f"{job['isa']:7s} {rows:4d} x {cols:<7d} {dtype:9s} {heap:8s} {over + ' / ' + under:34s}"
                           f"{relation} {bar:<5g} {ratio:7.2f}  {state}")
    return reached


def jobs_of(args):
    "What to time: every combination of what was asked for, or else what the goals need, and a look at less."
    best, heaps = _C.info()["isa"], ["default", "warm"] if platform.libc_ver()[0] == "glibc" else ["default"]
    shapes = [tuple(map(int, s.split("x"))) for s in args.shape] if args.shape else SHAPES
    if args.shape or args.dtype or args.threads or args.isa:
        jobs = [(isa, dtype, threads, shape, heap, None)
                for isa in args.isa or [best] for dtype in args.dtype or ["float32", "bfloat16"]
                for threads in args.threads or [1, 2] for shape in shapes for heap in heaps]
    else:
        needed = {}
        for goal_shapes, dtype, heap, over, under, *_ in GOALS:
            for shape in goal_shapes:
                needed.setdefault((shape, dtype, heap), {"function"}).update([over, under])
        jobs = [(best, dtype, 1, shape, heap, sorted(names)) for (shape, dtype, heap), names in needed.items() if heap in heaps]
        few = ["compile", "eager", "function", "plain triad", "streaming triad"]
        jobs += [(best, "float32", 2, LARGE[0], "default", few)]
        jobs += [(isa, "float32", 1, shape, "default", few + ["CE + KD", "close rows"])
                 for isa in reversed(_C.info()["isas"]) if isa != best for shape in MEDIUM + LARGE[:1]]
    names = "isa", "dtype", "threads", "shape", "heap", "only"
    return [dict(zip(names, job), seconds=0.5 if args.quick else 4, with_compile=not args.no_compile) for job in jobs]


def write_csv(path, rows):
    "All or nothing: a run that is stopped leaves the old file."
    part = path.with_name(path.name + ".part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half a second for each row instead of four")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="of the logits")
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts")
    parser.add_argument("--shape", nargs="+", help="such as 128x10")
    parser.add_argument("--isa", nargs="+", choices=_C.info()["isas"], help="instruction sets of the compiled core")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"), help="where the CSV goes")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        job["shape"], job["dtype"] = tuple(job["shape"]), DTYPES[job["dtype"]]
        return print(json.dumps(measure(**job)))

    where, rows, reached = machine(), [], []
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    for job in jobs_of(args):
        result = measure_in_own_process(**job)
        reached += report(job, result)
        sys.stdout.flush()
        rows += [{**where, "isa": job["isa"], "rows": job["shape"][0], "cols": job["shape"][1], "dtype": job["dtype"],
                  "threads": job["threads"], "heap": job["heap"], "clock": "cpu" if job["threads"] == 1 else "wall",
                  "contender": name, **{k: round(v, 2) for k, v in times.items()}} for name, times in result.items()]
    print("\nisa     shape          dtype     heap     ratio                             goal       here")
    print(*reached, sep="\n")
    write_csv(args.out, rows)
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
