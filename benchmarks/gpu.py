"""The CUDA kernels on a machine with a GPU, in one command: correctness, compute-sanitizer, times and memory.

    python benchmarks/gpu.py              all of it; writes benchmarks/gpu.csv
    python benchmarks/gpu.py --no-checks  the times alone
    python benchmarks/gpu.py --only dkd linear   no checks, and the times of these; writes no file

Times are medians of forward and backward between CUDA events, all contenders in turn in every round; the device sleeps
before each, so that launches are under way before it is their turn, and Python's time does not count. The limit is the
time that a copy of the same bytes takes (read student, read teacher, write gradient), measured in the same rounds.
Liger's kernels take part where they are installed, with the softmaxes that they leave to the caller.
"""
import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import kdlab as kd
from kdlab import cuda_ops, logit_reference

ROOT = Path(__file__).parents[1]
CSV = Path(__file__).with_suffix(".csv")
COLUMNS = "work", "dtype", "contender", "ms", "times_ours", "share_of_copy", "peak_MiB", "goal", "met"
SHAPES = (8192, 32000, .85), (4096, 128256, .80) # rows, classes, least share of the copy's bandwidth


def eager_kl(s, t): return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)


def eager_jsd(s, t):
    q, p = s.log_softmax(-1), t.log_softmax(-1)
    m = (.5 * (p.exp() + q.exp())).log()
    kl = lambda a: (a.exp() * (a - m)).sum(-1)
    return (.5 * kl(p) + .5 * kl(q)).mean()


def eager_reverse(s, t): return F.kl_div(t.log_softmax(-1), s.log_softmax(-1), reduction="batchmean", log_target=True)


def liger(kind):
    "Liger's kernel with its softmaxes, or None where it is not installed."
    try:
        from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss
    except ImportError: return None
    kl, jsd = LigerKLDIVLoss(reduction="batchmean", log_target=True), LigerJSD(beta=.5)
    return {"forward_kl": lambda s, t: kl(s.log_softmax(-1), t.log_softmax(-1)),
            "jsd": lambda s, t: jsd(s.log_softmax(-1), t.log_softmax(-1))}.get(kind)


def eager_both(s, t, y): return .1 * F.cross_entropy(s.float(), y) + .9 * eager_kl(s, t)
def eager_dkd(s, t, y): return 16 * logit_reference.dkd(s.float(), t.float(), y, 4.).mean()
def eager_nkd(s, t, y): return logit_reference.stable_nkd(s.float(), t.float(), y, 4.).mean()
def eager_mse(s, t): return (s.float() - t.float()).square().sum(-1).mean()


together = .1 * kd.CrossEntropy() + .9 * kd.ForwardKL()
EAGER = {"forward_kl": eager_kl, "reverse_kl": eager_reverse, "jsd": eager_jsd, "CE + KD": eager_both, "dkd": eager_dkd,
         "nkd": eager_nkd, "logit_mse": eager_mse}
WITH_LABELS = "CE + KD", "dkd", "nkd"
COMPILED = "forward_kl", "reverse_kl", "jsd", "CE + KD" # those that torch.compile is to be beaten at


def both_ways(f, student, *rest):
    "A call of the loss and its gradient."
    def run(): return torch.autograd.grad(f(student, *rest), student)
    return run


def times(runs, rounds=15, warm=3):
    "Median milliseconds of each, the contenders in turn in every round, in an order that rotates."
    names, found = list(runs), {name: [] for name in runs}
    for i in range(warm + rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000) # half a millisecond, in which Python gets ahead
            start.record()
            out = runs[name]()
            end.record()
            end.synchronize()
            del out
            if i >= warm: found[name].append(start.elapsed_time(end))
    return {name: statistics.median(x) for name, x in found.items()}


def peak(run):
    "MiB that a call takes beyond what is there before."
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def table(work, dtype, ms, peaks, goals=()):
    "Rows of the CSV. A goal is (contender, column, bound), the least times_ours or share_of_copy, the most of others."
    rows = []
    for name in ms:
        share = ms["copy"] / ms[name] if "copy" in ms else ""
        row = dict(work=work, dtype=str(dtype).split(".")[-1], contender=name, ms=ms[name], share_of_copy=share,
                   times_ours=ms[name] / ms["kdlab"], peak_MiB=peaks.get(name, ""), goal="", met="")
        for who, column, bound in goals:
            if who == name:
                least = column in ("times_ours", "share_of_copy")
                row["goal"] += f"{column} {'>=' if least else '<='} {bound:g} "
                reached = row[column] >= bound if least else row[column] <= bound
                row["met"] = "yes" if reached and row["met"] != "no" else "no"
        rows.append(row)
    return rows


def rows_of_logits(kind, rows, classes, dtype, least_share):
    "One divergence on whole logits, against eager, compiled and Liger's."
    s, t = (torch.randn(rows, classes, device="cuda", dtype=dtype).mul_(2) for _ in range(2))
    student, labels = s.requires_grad_(), torch.randint(classes, (rows,), device="cuda")
    inputs = (student, t, labels) if kind in WITH_LABELS else (student, t)
    f = getattr(kd.functional, kind, None)
    ours = together if f is None else lambda *x: f(*x, backend="cuda")
    runs = {"kdlab": both_ways(ours, *inputs), "eager": both_ways(EAGER[kind], *inputs)}
    if kind in COMPILED: runs["compile"] = both_ways(torch.compile(EAGER[kind]), *inputs)
    if liger(kind): runs["liger"] = both_ways(liger(kind), *inputs)
    half = torch.empty(3 * s.numel() // 2, device="cuda", dtype=dtype) # read and written once: the bytes of the loss
    other = torch.empty_like(half)
    ms = times(runs | {"copy": lambda: other.copy_(half)})
    goals = [(name, "times_ours", 2) for name in ("compile", "liger") if name in runs]
    if kind == "forward_kl": goals.append(("kdlab", "share_of_copy", least_share))
    return table(f"{kind} {rows}x{classes}", dtype, ms, {name: peak(run) for name, run in runs.items()}, goals)


def linear(tokens=8192, width=2048, classes=128256, dtype=torch.bfloat16):
    "Hidden states and heads, against whole logits in eager torch and against the four products alone."
    hs, ht = (torch.randn(tokens, width, device="cuda", dtype=dtype) for _ in range(2))
    ws, wt = (torch.randn(classes, width, device="cuda", dtype=dtype).mul_(width**-.5) for _ in range(2))
    hs.requires_grad_()
    ws.requires_grad_()

    def ours(): return torch.autograd.grad(kd.functional.linear_forward_kl(hs, ws, ht, wt), (hs, ws))
    def eager(): return torch.autograd.grad(eager_kl((hs @ ws.t()).float(), (ht @ wt.t()).float()), (hs, ws))

    def products(chunk=1024):
        with torch.no_grad():
            for i in range(0, tokens, chunk):
                z, _ = hs[i:i + chunk] @ ws.t(), ht[i:i + chunk] @ wt.t()
                z @ ws, z.t() @ hs[i:i + chunk]

    ms = times({"kdlab": ours, "eager": eager, "products": products}, rounds=5, warm=2)
    peaks = {"kdlab": peak(ours), "eager": peak(eager)}
    goals = [("products", "times_ours", 1 / 1.15), ("kdlab", "peak_MiB", peaks["eager"] / 8)]
    return table(f"linear_forward_kl {tokens}x{width}x{classes}", dtype, ms, peaks, goals=goals)


def write(path, rows):
    "All rows or none."
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, COLUMNS)
        out.writeheader()
        out.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    os.replace(part, path)


def show(rows):
    print(f"{'work':34} {'dtype':9} {'contender':9} {'ms':>9} {'x ours':>7} {'of copy':>8} {'peak MiB':>9}  goal")
    for r in rows:
        share = f"{r['share_of_copy']:8.2f}" if r["share_of_copy"] != "" else " " * 8
        room = f"{r['peak_MiB']:9.0f}" if r["peak_MiB"] != "" else " " * 9
        print(f"{r['work']:34} {r['dtype']:9} {r['contender']:9} {r['ms']:9.3f} {r['times_ours']:7.2f} {share} {room}  "
              f"{r['goal']}{'met' if r['met'] == 'yes' else 'MISSED' if r['met'] else ''}")


SANITIZED = """
import torch, kdlab as kd
for n, C in ((3, 10), (2, 1271), (2, 32000), (1, 128256)):
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("forward_kl", "soft_cross_entropy", "jsd", "dkd", "nkd", "logit_mse"):
            s, t = (torch.randn(n, C + 1, device="cuda", dtype=dtype)[:, 1:].requires_grad_(i == 0) for i in range(2))
            T = {} if name == "logit_mse" else {"T": 2.}
            y = torch.arange(n, device="cuda")
            torch.autograd.grad(getattr(kd.functional, name)(s, t, y, backend="cuda", **T), s)
for f, shape in ((kd.functional.hint, (3, 40001)), (kd.functional.attention_transfer, (2, 5, 9, 7))):
    s = torch.randn(shape, device="cuda", requires_grad=True)
    torch.autograd.grad(f(s, torch.randn(shape, device="cuda"), backend="cuda"), s)
torch.cuda.synchronize()
"""


def checks():
    "Tests on the device, then a small run under each tool of compute-sanitizer."
    steps = [[sys.executable, "-m", "pytest", "-q", "-k", "not emulated", str(ROOT / "tests" / "test_cuda.py")]]
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None: print("compute-sanitizer was not found: that step is left out")
    for kind in ("memcheck", "racecheck", "synccheck", "initcheck") if tool else ():
        steps.append([tool, "--tool", kind, "--error-exitcode", "1", sys.executable, "-c", SANITIZED])
    for step in steps:
        print("$", *step[:5], "...", flush=True)
        whole = {} if step[1] == "-m" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} # one allocation a tensor
        if subprocess.run(step, env=os.environ | whole).returncode: return False
    return True


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--no-checks", action="store_true")
    options.add_argument("--only", nargs="+", choices=(*EAGER, "linear"))
    missing = cuda_ops.nothing_here() or (None if torch.cuda.is_available() else "this PyTorch sees no GPU")
    args = options.parse_args()
    if missing: sys.exit(f"nothing to measure: {missing}")
    good, rows = args.no_checks or args.only or checks(), []
    wanted = args.only or (*EAGER, "linear")
    for dtype in (torch.float32, torch.bfloat16):
        for kind in filter(wanted.__contains__, EAGER):
            for n, classes, share in SHAPES: rows += rows_of_logits(kind, n, classes, dtype, share)
    if "linear" in wanted: rows += linear()
    print(torch.cuda.get_device_name(0))
    show(rows)
    if not args.only: write(CSV, rows)
    sys.exit(0 if good and all(r["met"] != "no" for r in rows) else 1)


if __name__ == "__main__": main()
