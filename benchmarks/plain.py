"""Plain torch, which is what runs without the compiled core, against eager PyTorch as one would write it: forward and
backward of the softened divergences on one thread, and the memory that they take.

Times are CPU times of the thread. Contenders take turns, and the order rotates from round to round; the ratio is that of
medians, and beside it that of the lowest tenths. Every gradient is dropped before the next call. Memory is what the
process grew by, in a process of its own."""
import argparse
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import kdlab as kd

SHAPES = [(128, 10), (8192, 10), (256, 1000), (512, 32000)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
T = 4.0


def log_probs(student, teacher):
    return F.log_softmax(teacher / T, -1), F.log_softmax(student / T, -1)


def kl(log_a, log_b):
    return F.kl_div(log_b, log_a, log_target=True, reduction="batchmean")


def forward_kl(student, teacher):
    return T * T * kl(*log_probs(student, teacher))


def reverse_kl(student, teacher):
    log_p, log_q = log_probs(student, teacher)
    return T * T * kl(log_q, log_p)


def jsd(student, teacher):
    log_p, log_q = log_probs(student, teacher)
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    return T * T * 0.5 * (kl(log_p, log_m) + kl(log_q, log_m))


def skew_kl(student, teacher):
    log_p, log_q = log_probs(student, teacher)
    return T * T * kl(log_p, (0.1 * log_p.exp() + 0.9 * log_q.exp()).log())


def skew_reverse_kl(student, teacher):
    log_p, log_q = log_probs(student, teacher)
    return T * T * kl(log_q, (0.1 * log_q.exp() + 0.9 * log_p.exp()).log())


def total_variation(student, teacher):
    return T * T * (F.softmax(teacher / T, -1) - F.softmax(student / T, -1)).abs().sum(-1).mean() / 2


def soft_cross_entropy(student, teacher):
    return T * T * F.cross_entropy(student / T, F.softmax(teacher / T, -1))


EAGER = [forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, total_variation, soft_cross_entropy]


def pair(shape, dtype):
    torch.manual_seed(0)
    student, teacher = (torch.randn(shape).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def contenders(eager, shape, dtype):
    "Forward and backward by eager code and by kdlab."
    student, teacher = pair(shape, dtype)
    plain = getattr(kd.functional, eager.__name__)
    return {"eager": lambda: torch.autograd.grad(eager(student, teacher), student),
            "plain": lambda: torch.autograd.grad(plain(student, teacher, T=T, backend="torch"), student)}


def measure(functions, seconds):
    "CPU times of each contender in microseconds."
    def sample(function, calls):
        start = time.thread_time()
        for _ in range(calls):
            function()
        return 1e6 * (time.thread_time() - start) / calls

    calls = {name: max(1, round(1000 / min(sample(f, 1) for _ in range(3)))) for name, f in functions.items()}
    times, names, stop = {name: [] for name in functions}, list(functions), time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times["eager"]) < 7:
        for name in names:
            times[name].append(sample(functions[name], calls[name]))
        names.reverse()
    return times


def memory(line):
    "A line of what Linux knows of this process, in bytes."
    with open("/proc/self/status") as status:
        return next(1024 * int(text.split()[1]) for text in status if text.startswith(line))


def peak(eager, name, shape, dtype):
    "What the process grows by in a forward and backward, in units of the logits' size; Linux alone."
    contenders(eager, (8, 16), dtype)[name]()                      # what is loaded once does not count
    function = contenders(eager, shape, dtype)[name]
    with open("/proc/self/clear_refs", "w") as file:               # the highest mark starts from here
        file.write("5")
    before = memory("VmRSS")
    grad, = function()
    return (memory("VmHWM") - before) / grad.nbytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row of the table")
    parser.add_argument("--only", nargs="+", default=[f.__name__ for f in EAGER], help="divergences")
    parser.add_argument("--peak", nargs=3, metavar=("DIVERGENCE", "WHO", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        name, who, dtype = args.peak
        return print(peak(globals()[name], who, SHAPES[-1], DTYPES[dtype]))
    print("plain / eager, CPU time on one thread: medians (lowest tenths)")
    for shape in SHAPES:
        for dtype in DTYPES:
            for eager in EAGER:
                if eager.__name__ not in args.only:
                    continue
                times = measure(contenders(eager, shape, DTYPES[dtype]), args.seconds)
                middle = {k: statistics.median(v) for k, v in times.items()}
                low = {k: sorted(v)[len(v) // 10] for k, v in times.items()}
                print(f"{shape[0]:5d} x {shape[1]:<6d}{dtype:9s} {eager.__name__:19s} {middle['plain']:9.0f} us  "
                      f"{middle['plain'] / middle['eager']:5.2f}  ({low['plain'] / low['eager']:.2f})", flush=True)
    if not sys.platform.startswith("linux"):
        return
    print(f"memory for {SHAPES[-1][0]} x {SHAPES[-1][1]}, in units of the student's logits: eager, plain")
    for dtype in DTYPES:
        for name in args.only[:1]:
            grown = [subprocess.run([sys.executable, __file__, "--peak", name, who, dtype], stdout=subprocess.PIPE, text=True,
                                    check=True).stdout for who in ("eager", "plain")]
            print(f"{dtype:9s} {name:19s} " + "  ".join(f"{float(x):5.2f}" for x in grown), flush=True)


if __name__ == "__main__":
    main()
