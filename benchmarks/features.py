"""Forward and backward of the losses on features and relations: kdlab against eager PyTorch and torch.compile, one thread.

CPU time of that thread, contenders in turn, medians. `--warm` keeps freed memory mapped for everybody, so that large
outputs do not pay for page faults: that is the fair comparison of the kernels themselves. The limit is a triad of the
same bytes, a = b + c on tensors of the features' size into memory that is already there.
"""
import argparse
import csv
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

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
    "hint": (MAPS, f.hint, F.mse_loss),
    "normalised hint": (MAPS, lambda s, t: f.hint(s, t, normalize=True), normalised_hint),
    "attention transfer": (MAPS, f.attention_transfer, attention),
    "channel-wise KL": (MAPS, f.channel_kl, channel_kl),
    "cosine": (HIDDEN, f.cosine, cosine),
    "similarity": ((64, 262144), f.similarity, similarity),
    "RKD angle": ((256, 512), f.rkd_angle, rkd_angle),
    "DIST": ((2048, 1000), f.dist, dist),
}


def seconds(call):
    start = time.thread_time()
    call()
    return time.thread_time() - start


def measure(shape, ours, eager, rounds, with_compile):
    "Median seconds of each contender, and of the triad."
    torch.manual_seed(0)
    student, teacher, into = torch.randn(shape), torch.randn(shape), torch.empty(shape)
    leaf = student.clone().requires_grad_()
    functions = {"kdlab": ours, "eager": eager}
    if with_compile:
        torch._dynamo.reset()
        functions["compile"] = torch.compile(eager, dynamic=False)
    run = lambda f: (lambda: torch.autograd.grad(f(leaf, teacher), leaf))
    calls = {name: run(f) for name, f in functions.items()} | {"triad": lambda: torch.add(student, teacher, out=into)}
    for call in calls.values():
        for _ in range(2):
            call()
    samples, names = {name: [] for name in calls}, list(calls)
    for i in range(rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            samples[name].append(seconds(calls[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="samples of each contender (default: 15)")
    parser.add_argument("--only", nargs="+", choices=WORK, default=list(WORK), help="which losses (default: all)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--warm", action="store_true", help="keep freed memory mapped (glibc)")
    parser.add_argument("--out", type=Path, help="write a CSV there")
    args = parser.parse_args()
    keep = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}
    if args.warm and not keep.items() <= os.environ.items():  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | keep)
    torch.set_num_threads(1)
    rows = []
    for name in args.only:
        shape, ours, eager = WORK[name]
        times = measure(shape, ours, eager, args.rounds, not args.no_compile)
        mine = times["kdlab"]
        print(f"{name:20s} {'x'.join(map(str, shape)):>16s}", "  ".join(
            f"{k} {1e3 * v:8.2f} ms" + ("" if k == "kdlab" else f" ({v / mine:.2f}x)") for k, v in times.items()), flush=True)
        rows += [{"loss": name, "shape": "x".join(map(str, shape)), "contender": k, "ms": round(1e3 * v, 4),
                  "times_kdlab": round(v / mine, 3), "heap": "warm" if args.warm else "default", "torch": torch.__version__,
                  "machine": platform.machine(), "isa": kd.ops._C.info()["isa"]} for k, v in times.items()]
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
