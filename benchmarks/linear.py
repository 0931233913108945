"""Divergences over a large vocabulary: from hidden states and head weights, and from a sparse teacher. Time and peak memory
of kdlab against eager PyTorch and torch.compile.

Times are CPU times of one thread, medians over rounds in which the contenders take turns; the order rotates. The limit
of the linear ones is the time of the four matrix products that no method can do without. Memory is the growth of the
process's peak over one call, with the gradients that it returns, each way in a process of its own: called once before,
so that libraries and compiled code are there, after which all free memory is given back and the peak is reset (Linux).

Without arguments it times what has goals and the sparse teacher; `--group "reverse KL" JSD` the rest of the family.
"""
import argparse
import csv
import ctypes
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from soft_kl import machine

import kdlab as kd
from kdlab.functional import linear_forward_kl, linear_jsd, linear_reverse_kl, sparse_forward_kl, top_k

T, K = 4.0, 64

# What issue 3 asks for: contenders of "forward KL", time divided by time or megabytes, at least or at most.
GOALS = [("eager", "kdlab", ">=", 1.5), ("compile", "kdlab", ">=", 1.1), ("kdlab", "four products", "<=", 1.12)]
MOST_MEGABYTES = 135


def linear_data(rows, width, classes):
    gen = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=gen)
    student = randn(rows, width).requires_grad_(), (randn(classes, width) / width**0.5).requires_grad_()
    return *student, randn(rows, width), randn(classes, width) / width**0.5


def sparse_data(rows, width, classes):
    "Logits of which the largest 64 hold nearly all of the mass, as in a language model."
    gen = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(rows, classes, generator=gen)
    student = (teacher + torch.randn(rows, classes, generator=gen)).requires_grad_()
    return student, teacher, *top_k(teacher, K)


def logits(hs, ws, ht, wt):
    return hs @ ws.t(), ht @ wt.t()


def kl(log_q, log_p):
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * T**2


def eager_forward(*heads):
    z_s, z_t = logits(*heads)  # held until the loss is there, as in a training step
    return kl(F.log_softmax(z_s / T, -1), F.log_softmax(z_t / T, -1))


def eager_reverse(*heads):
    z_s, z_t = logits(*heads)
    return kl(F.log_softmax(z_t / T, -1), F.log_softmax(z_s / T, -1))


def eager_jsd(*heads):
    z_s, z_t = logits(*heads)
    log_q, log_p = F.log_softmax(z_s / T, -1), F.log_softmax(z_t / T, -1)
    log_m = torch.logaddexp(log_q, log_p) - torch.tensor(2.0).log()
    return (kl(log_m, log_p) + kl(log_m, log_q)) / 2


def products(hs, ws, ht, wt):
    "Two ways forward, two back for the student."
    with torch.no_grad():
        z_s, z_t = hs @ ws.t(), ht @ wt.t()
        return z_s @ ws, z_s.t() @ hs, z_t


def eager_bucket(student, teacher, log_p, ids):
    log_q = F.log_softmax(student, -1).gather(-1, ids)
    rest, outside = 1 - log_p.exp().sum(-1), 1 - log_q.exp().sum(-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) + rest * (rest / outside).log()).mean()


def whole_logits(*heads):
    z_s, z_t = logits(*heads)
    return kd.functional.forward_kl(z_s, z_t, T=T)


def gradients(loss):
    "Forward and backward, into whatever wants a gradient."
    return lambda *x: torch.autograd.grad(loss(*x), [t for t in x if t.requires_grad])


def contenders(group):
    "Functions of the group's data, by name."
    compiled = lambda f: torch.compile(f, dynamic=False)
    losses = {
        "forward KL": {"kdlab": lambda *x: linear_forward_kl(*x, T=T), "whole logits": whole_logits, "eager": eager_forward,
                       "compile": compiled(eager_forward), "kdlab, torch": lambda *x: linear_forward_kl(*x, T=T, backend="torch")},
        "reverse KL": {"kdlab": lambda *x: linear_reverse_kl(*x, T=T), "eager": eager_reverse, "compile": compiled(eager_reverse)},
        "JSD": {"kdlab": lambda *x: linear_jsd(*x, T=T), "eager": eager_jsd, "compile": compiled(eager_jsd)},
        "sparse": {"kdlab": lambda s, t, p, i: sparse_forward_kl(s, p, i),
                   "kdlab, uniform": lambda s, t, p, i: sparse_forward_kl(s, p, i, tail="uniform"),
                   "dense": lambda s, t, p, i: kd.functional.forward_kl(s, t), "eager": eager_bucket,
                   "compile": compiled(eager_bucket)},
    }[group]
    calls = {name: gradients(loss) for name, loss in losses.items()}
    return calls | ({"four products": products} if group == "forward KL" else {})


def data(group, shape):
    return (sparse_data if group == "sparse" else linear_data)(*shape)


def high_water():
    "The peak of this process's memory in bytes (getrusage would count the parent's)."
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def peak(group, name, shape):
    "Bytes by which one call raises the peak of this process."
    tensors, call = data(group, shape), contenders(group)[name]
    call(*tensors)
    kd.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = high_water()
    call(*tensors)
    print(high_water() - before)


def peak_in_own_process(group, name, shape):
    command = [sys.executable, __file__, "--shape", *map(str, shape), "--peak", group, name]
    if not sys.platform.startswith("linux"):
        return float("nan")
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]) / 1e6


def measure(group, shape, rounds):
    "Median CPU seconds of each contender."
    tensors, calls = data(group, shape), contenders(group)
    names, times = list(calls), {name: [] for name in calls}
    for turn in range(rounds + 1):  # the first round warms up
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            if turn > 1 and times[name][0] > 5 * min(t[0] for t in times.values() if t):
                continue  # one look at those that are many times slower
            start = time.thread_time()
            calls[name](*tensors)
            times[name].append(time.thread_time() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def report(group, shape, seconds, megabytes):
    "A table of one group, and the goals beside it."
    print(f"\n{group}, {' x '.join(map(str, shape))}, float32, one thread")
    print(f"  {'':16s}{'seconds':>9s}{'x kdlab':>9s}{'peak MB':>9s}")
    for name in sorted(seconds, key=seconds.get):
        print(f"  {name:16s}{seconds[name]:9.4f}{seconds[name] / seconds['kdlab']:9.2f}{megabytes[name]:9.0f}")
    if group != "forward KL":
        return
    for over, under, relation, bar in GOALS:
        ratio = seconds[over] / seconds[under]
        met = ratio >= bar if relation == ">=" else ratio <= bar
        print(f"    {over} / {under} = {ratio:.2f}, goal {relation} {bar}: {'met' if met else 'MISSED'}")
    met = megabytes["kdlab"] <= MOST_MEGABYTES
    print(f"    peak of kdlab {megabytes['kdlab']:.0f} MB, goal <= {MOST_MEGABYTES}: {'met' if met else 'MISSED'}")


def write(path, rows):
    "The CSV, whole or not at all."
    part = path.with_suffix(".part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)
    print(f"\nwrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(1024, 512, 32000), metavar=("ROWS", "WIDTH", "CLASSES"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--group", nargs="+", default=["forward KL", "sparse"],
                        choices=["forward KL", "reverse KL", "JSD", "sparse"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"), help="where the CSV goes")
    parser.add_argument("--peak", nargs=2, metavar=("GROUP", "NAME"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        return peak(*args.peak, args.shape)
    where, rows = machine(), []
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    for group in args.group:
        seconds = measure(group, args.shape, args.rounds)
        megabytes = {name: peak_in_own_process(group, name, args.shape) for name in seconds}
        report(group, args.shape, seconds, megabytes)
        sys.stdout.flush()
        rows += [{**where, "group": group, "rows": args.shape[0], "width": args.shape[1], "classes": args.shape[2],
                  "dtype": "float32", "threads": 1, "contender": name, "median_s": round(s, 5),
                  "peak_mb": round(megabytes[name], 1)} for name, s in seconds.items()]
    write(args.out, rows)


if __name__ == "__main__":
    main()
