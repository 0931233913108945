"""A divergence straight from hidden states: time and peak memory of kdlab against eager PyTorch and torch.compile.

Times are CPU times of one thread, medians over rounds in which the contenders take turns. The bar is the time of the
four matrix products that no method can do without. Memory is the growth of the process's peak, each way in a process
of its own.
"""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import kdlab as kd

T = 4.0


def data(rows, width, classes):
    gen = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=gen)
    student = randn(rows, width).requires_grad_(), (randn(classes, width) / width**0.5).requires_grad_()
    return *student, randn(rows, width), randn(classes, width) / width**0.5


def eager_loss(hs, ws, ht, wt):
    log_q, log_p = F.log_softmax(hs @ ws.t() / T, -1), F.log_softmax(ht @ wt.t() / T, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * T**2


def products(hs, ws, ht, wt):
    "The four products: two ways forward, two back for the student."
    with torch.no_grad():
        z_s, z_t = hs @ ws.t(), ht @ wt.t()
        return z_s @ ws, z_s.t() @ hs, z_t


def contenders():
    compiled = torch.compile(eager_loss)
    grad = lambda loss: lambda hs, ws, ht, wt: torch.autograd.grad(loss(hs, ws, ht, wt), (hs, ws))
    return {"kdlab": grad(lambda *x: kd.functional.linear_forward_kl(*x, T=T)), "eager": grad(eager_loss),
            "compile": grad(compiled), "four products": products}


def high_water():
    "The peak of this process's memory in MiB (Linux; getrusage would count the parent's)."
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak(name, shape):
    "MiB by which one call raises the peak of a fresh process; the call before it, on few rows, loads what it needs."
    tensors, call = data(*shape), contenders()[name]
    call(tensors[0][:8].detach().requires_grad_(), tensors[1], tensors[2][:8], tensors[3])
    before = high_water()
    call(*tensors)
    print(high_water() - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(1024, 512, 32000), metavar=("ROWS", "WIDTH", "CLASSES"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", help="only the peak memory of this contender (used by the benchmark itself)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        return peak(args.peak, args.shape)
    tensors, calls = data(*args.shape), contenders()
    times = {name: [] for name in calls}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, call in calls.items():
            start = time.thread_time()
            call(*tensors)
            times[name].append(time.thread_time() - start)
    median = {name: statistics.median(t[1:]) for name, t in times.items()}
    print(f"{'':14s}{'seconds':>9s}{'x products':>12s}{'x kdlab':>9s}{'peak MiB':>10s}")
    for name, seconds in median.items():
        command = [sys.executable, __file__, "--shape", *map(str, args.shape), "--peak", name]
        mib = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{name:14s}{seconds:9.3f}{seconds / median['four products']:12.2f}{seconds / median['kdlab']:9.2f}{mib:10.0f}")


if __name__ == "__main__":
    main()
