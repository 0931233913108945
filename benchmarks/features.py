"""Forward and backward of the losses on features and relations: kdlab against eager PyTorch, torch.compile and the machine's
limits.

As in soft_kl.py: CPU time of one thread, medians, contenders in turn and the order rotating; each gradient is dropped before
the next call, so that kdlab recycles its memory, and "fresh" frees that memory first. The triads move as many bytes as a loss
must: two tensors read, one written. Memory is the growth of the process's peak over one call (Linux), in a process of its
own. The last table has every goal of issue 3 beside what was reached: under three minutes in all. With --all everything is
timed once more in a process whose heap keeps what is freed ("warm"), where PyTorch pays for no fresh pages either, and the
peaks of the others are measured as well.
"""
import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from linear import high_water
from soft_kl import WARM_HEAP, machine, triads, write_csv

import kdlab as kd

T = 4.0


def normalised_hint(s, t):
    return F.mse_loss(F.normalize(s.flatten(1)), F.normalize(t.flatten(1)))


def attention(s, t):
    a, b = (F.normalize(x.pow(2).mean(1).flatten(1)) for x in (s, t))
    return F.mse_loss(a, b)


def channel_kl(s, t):
    log_p, log_q = ((x.flatten(2) / T).log_softmax(-1) for x in (t, s))
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") * T**2 / log_p.shape[:2].numel()


def cosine(s, t):
    return (1 - F.cosine_similarity(s, t, dim=-1)).mean()


def similarity(s, t):
    a, b = (F.normalize(x @ x.T) for x in (s, t))
    return F.mse_loss(a, b)


def rkd_angle(s, t):
    def cosines(x):
        e = F.normalize(x[None] - x[:, None], dim=2)
        return torch.bmm(e, e.transpose(1, 2))
    with torch.no_grad():
        want = cosines(t)
    return F.smooth_l1_loss(cosines(s), want)


def dist(s, t):
    def pearson(a, b):
        return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)).mean()
    q, p = s.softmax(1), t.softmax(1)
    return 2 - pearson(q, p) - pearson(q.T, p.T)


MAPS, HIDDEN = (64, 256, 32, 32), (8, 512, 768)
f = kd.functional
WORK = {  # name: (shape, kdlab, eager)
    "attention transfer": (MAPS, f.attention_transfer, attention),
    "normalised hint": (MAPS, lambda s, t: f.hint(s, t, normalize=True), normalised_hint),
    "channel-wise KL": (MAPS, f.channel_kl, channel_kl),
    "hint": (MAPS, f.hint, F.mse_loss),
    "cosine": (HIDDEN, f.cosine, cosine),
    "DIST": ((2048, 1000), f.dist, dist),
    "similarity": ((64, 262144), f.similarity, similarity),
    "RKD angle": ((256, 512), f.rkd_angle, rkd_angle),
}

# What issue 3 asks for: loss, time, divided by time, at least or at most. The default heap, gradients in recycled memory.
GOALS = [
    ("attention transfer", "eager", "kdlab", ">=", 19), ("attention transfer", "compile", "kdlab", ">=", 4),
    ("normalised hint", "eager", "kdlab", ">=", 47), ("normalised hint", "compile", "kdlab", ">=", 8.5),
    ("channel-wise KL", "eager", "kdlab", ">=", 47), ("channel-wise KL", "compile", "kdlab", ">=", 13),
    ("attention transfer", "kdlab", "plain triad", "<=", 1.15), ("normalised hint", "kdlab", "plain triad", "<=", 1.15),
    ("channel-wise KL", "kdlab", "plain triad", "<=", 1.15),
    ("DIST", "eager", "kdlab", ">=", 18), ("DIST", "compile", "kdlab", ">=", 6),
    ("similarity", "eager", "kdlab", ">=", 1.6), ("similarity", "compile", "kdlab", ">=", 1.6),
    ("RKD angle", "eager", "kdlab", ">=", 200), ("RKD angle", "compile", "kdlab", ">=", 100),
]
MOST_MEGABYTES = {"RKD angle": 4}


def data(name):
    "Student, which wants a gradient, and teacher."
    gen = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(WORK[name][0], generator=gen) for _ in range(2))
    return student.requires_grad_(), teacher


def contenders(name, with_compile):
    "Functions of student and teacher that do one forward and backward, by name."
    _, ours, eager = WORK[name]

    def fresh(s, t):
        kd.empty_cache()
        return ours(s, t)

    losses = {"kdlab": ours, "fresh": fresh, "eager": eager}
    if with_compile:
        losses["compile"] = torch.compile(eager, dynamic=False)
    run = lambda loss: lambda s, t: torch.autograd.grad(loss(s, t), s)
    return {k: run(loss) for k, loss in losses.items()}


def measure(name, heap, seconds, with_compile):
    "Median and 10th percentile of each contender in milliseconds."
    student, teacher = data(name)
    run = lambda call: lambda: call(student, teacher)
    calls = {k: run(call) for k, call in contenders(name, with_compile).items() if heap == "default" or k != "fresh"}
    if heap == "default":
        calls |= triads(student.detach(), teacher)
    for call in calls.values():
        call()
    names, times = list(calls), {k: [] for k in calls}
    stop, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < stop or turn < 5:
        for k in names[turn % len(names):] + names[:turn % len(names)]:
            if turn > 2 and times[k][0] > 30 * times["kdlab"][0]:
                continue  # three looks at those that are many times slower
            start = time.thread_time()
            calls[k]()
            times[k].append(1e3 * (time.thread_time() - start))
        turn += 1
    return {k: {"median_ms": statistics.median(t), "p10_ms": sorted(t)[len(t) // 10]} for k, t in times.items()}


def peak(name, contender, with_compile):
    "Megabytes by which one call raises the peak of this process, the gradient among them."
    tensors, call = data(name), contenders(name, with_compile)[contender]
    call(*tensors)
    kd.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = high_water()
    call(*tensors)
    return (high_water() - before) / 1e6


def in_own_process(what, heap, *args):
    "`measure` or `peak` in a new process, with the heap asked for."
    environment = os.environ | (WARM_HEAP if heap == "warm" else {})
    done = subprocess.run([sys.executable, __file__, "--job", json.dumps([what, *args])], env=environment,
                          stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(name, heap, times, megabytes):
    "Print one loss; the rows of the last table that it decides."
    print(f"\n{name}, {'x'.join(map(str, WORK[name][0]))}, {heap} heap: median (p10), times kdlab, peak")
    for k, t in sorted(times.items(), key=lambda item: item[1]["median_ms"]):
        memory = f"{megabytes[k]:8.1f} MB" if k in megabytes else ""
        print(f"  {k:16s}{t['median_ms']:10.3f} ms ({t['p10_ms']:.3f})".ljust(42),
              f"{t['median_ms'] / times['kdlab']['median_ms']:8.2f}{memory}")
    if heap != "default":
        return []
    reached = []
    for loss, over, under, relation, bar in GOALS:
        if loss == name and {over, under} <= times.keys():
            ratio = times[over]["median_ms"] / times[under]["median_ms"]
            reached.append((name, f"{over} / {under}", relation, bar, ratio))
    if name in MOST_MEGABYTES and "kdlab" in megabytes:
        reached.append((name, "kdlab, MB", "<=", MOST_MEGABYTES[name], megabytes["kdlab"]))
    return reached


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="for each loss and heap (default: 4)")
    parser.add_argument("--all", action="store_true", help="a warm heap and the peaks of memory of the others, too")
    parser.add_argument("--only", nargs="+", choices=WORK, default=list(WORK), help="which losses (default: all)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks of memory out")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"), help="where the CSV goes")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.job:
        what, *job = json.loads(args.job)
        return print(json.dumps({"measure": measure, "peak": peak}[what](*job)))
    where, rows, reached, with_compile = machine(), [], [], not args.no_compile
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    for name in args.only:
        for heap in ["default", "warm"] if args.all and platform.libc_ver()[0] == "glibc" else ["default"]:
            times = in_own_process("measure", heap, name, heap, args.seconds, with_compile)
            megabytes = {}
            if heap == "default" and sys.platform.startswith("linux") and not args.no_memory:
                megabytes = {k: in_own_process("peak", heap, name, k, k == "compile")
                             for k in (("kdlab", "eager", "compile") if args.all else ("kdlab",)) if k in times}
            reached += report(name, heap, times, megabytes)
            sys.stdout.flush()
            rows += [{**where, "loss": name, "shape": "x".join(map(str, WORK[name][0])), "dtype": "float32", "threads": 1,
                      "heap": heap, "contender": k, **{m: round(v, 4) for m, v in t.items()},
                      "peak_mb": round(megabytes[k], 1) if k in megabytes else ""} for k, t in times.items()]
    print(f"\n{'loss':20s}{'ratio':24s}goal        here")
    for name, ratio, relation, bar, got in reached:
        short = bar / got - 1 if relation == ">=" else got / bar - 1  # by how much the goal is missed
        print(f"{name:20s}{ratio:24s}{relation} {bar:<7g}{got:8.2f}  {'met' if short <= 0 else f'missed by {short:.0%}'}")
    write_csv(args.out, rows)
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
