"""docs/losses.md: what every loss module does, found by trying it, and where it comes from, read in its docstring.

`python docs/loss_table.py` writes the file. Nothing is listed by hand: classes are found in `kdlab.losses`, properties are
probed on small inputs, papers and differences are sentences of the docstrings. Build the compiled core first
(KDLAB_EXT=1), or the column of kernels would say no everywhere.
"""
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import torch
from torch import nn

import kdlab as kd
from kdlab import losses, ops

OUT = Path(__file__).parent / "losses.md"
BASES = {"LinearDivergence", "SparseLoss", "Loss", "RowLoss", "Divergence", "FeatureLoss", "RelationLoss", "LogitLoss", "Objective",
         "MapLoss", "ProjectedMapLoss", "TrainedLoss"}
SOURCE = re.compile(r"(?:arXiv:)(\d{4}\.\d{4,5})|(?:doi:)(10\.[\w./-]*\w)|(?:openreview:)(\w+)")


def classes():
    "Public loss modules, by the module that defines them, in the order of definition."
    for info in pkgutil.iter_modules(losses.__path__):
        module = importlib.import_module(f"kdlab.losses.{info.name}")
        own = [getattr(module, n) for n in module.__all__ if not n.startswith("_")]
        found = [c for c in own if inspect.isclass(c) and issubclass(c, losses.Loss) and c.__module__ == module.__name__
                 and c.__name__ not in BASES]
        yield from found


# inputs to try, until one fits

def samples(seed=0):
    gen = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)
    pairs = {"logits": lambda: new(6, 5), "vectors": lambda: new(6, 5), "maps": lambda: new(6, 5, 4, 4),
             "tokens": lambda: new(6, 4, 5), "attention": lambda: new(6, 2, 4, 4).softmax(-1),
             "pairs of maps": lambda: (new(6, 5, 4, 4), new(6, 3, 4, 4)), "lists of maps": lambda: [new(6, 5, 4, 4) for _ in range(2)]}
    for name, make in pairs.items(): yield name, make(), make()


def made(cls, **options):
    "An instance with defaults; a wrapper goes around SoftKL with these options; numbers of channels are those of the samples."
    takes = inspect.signature(cls.__init__).parameters
    if "loss" not in takes:
        needed = {n: str(p.annotation) for n, p in takes.items() if p.default is p.empty}
        numbers = {n: 5 for n, a in needed.items() if "int" in a}
        own = numbers | {n: -torch.ones(5) if "Tensor" in a else nn.Linear(5, 3) for n, a in needed.items() if "Module" in a}
        return cls(**own, **options)
    by = {"by": lambda s, t, y: t.softmax(-1).amax(-1)} if cls is kd.RowWeighted else {}
    return cls(kd.SoftKL(**options), **by)


def ready(loss, s, t):
    "The loss, its modules made for these shapes if it waits for them; always the same random numbers."
    if not (hasattr(loss, "pending") and loss.pending()): return loss
    torch.manual_seed(0)
    return loss.made_for(s, t, kd.Projector)


def has(cls, option):
    return bool({option, "loss"} & set(inspect.signature(cls.__init__).parameters))


def like(x, g):
    "g applied to a tensor or to each of several."
    return g(x) if isinstance(x, torch.Tensor) else type(x)(like(y, g) for y in x)


def rows_of(x, i, j): return like(x, lambda v: v[i:j])


LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


def fits(loss):
    "The kinds of input that the loss takes, and the first of them."
    found = list(_fitting(loss))
    kinds = [name for name, *_ in found if name != "attention" or len(found) == 1] # any map would do
    return (", ".join(kinds), *found[0][1:]) if found else None


def _fitting(loss):
    for name, s, t in samples():
        if (name == "logits") != hasattr(loss, "ignore_index"): continue
        try: value = loss(s, t, LABELS) if name == "logits" else ready(loss, s, t)(s, t)
        except Exception: continue
        if isinstance(value, torch.Tensor) and value.isfinite().all(): yield name, s, t


def works(call):
    try: call()
    except (TypeError, ValueError): return False
    return True


def same(a, b): return bool(torch.allclose(a, b, rtol=1e-6, atol=1e-9))


def properties(cls):
    "What a loss does, by trying it; None where no input fits or it cannot be made."
    quiet = {"share": 0.} if "share" in inspect.signature(cls.__init__).parameters else {}  # of what is erased at random: the probes compare values
    try: loss = made(cls, **quiet)
    except Exception: return None
    found = fits(loss)
    if found is None: return None
    name, s, t = found
    loss = ready(loss, s, t)
    logits = name == "logits"
    target = (LABELS,) if logits else ()
    call = lambda a, b: loss(a, b, *target)
    value = call(s, t)
    perm = torch.tensor([3, 0, 4, 1, 2])
    place = torch.argsort(perm)
    half = lambda i: loss(rows_of(s, i, i + 3), rows_of(t, i, i + 3), *(y[i:i + 3] for y in target))
    none = lambda: ready(made(cls, reduction="none"), s, t)(s, t, *target)
    return {
        "takes": name,
        "shift": logits and same(call(s + 3, t - 1), value),
        "scale": same(call(like(s, lambda v: 2 * v), like(t, lambda v: 5 * v)), value),
        "permutation": logits and same(loss(s[:, perm], t[:, perm], place[LABELS]), value),
        "zero": same(call(s, s), torch.zeros_like(value)),
        "square": f"T = {kd.losses.objective.shown(loss.T):g}" if getattr(loss, "t_squared", None) else "",
        "couples": not same(value, (half(0) + half(3)) / 2),
        "none": has(cls, "reduction") and works(none),
        "labels": logits and not works(lambda: loss(s, t)),
        "teacher": works(lambda: loss(s, t, *target)) and not works(lambda: loss(s, None, *target)),
        "kernel": has(cls, "backend") and works(lambda: ready(made(cls, backend="cpp"), s, t)(s, t, *target)),
        "trains": sum(p.numel() for p in loss.parameters()) > 0,
    }


COLUMNS = {"takes": "takes", "shift": "a shift of each row changes nothing", "scale": "nor does scale", "zero": "0 when equal",
           "square": "T², default", "couples": "couples the batch", "none": "`none`", "labels": "needs labels",
           "teacher": "needs a teacher", "kernel": "CPU kernel", "trains": "has parameters"}


def cell(x): return x if isinstance(x, str) else "yes" if x else ""


# papers

def documents(cls):
    "The docstrings that explain a class: its own, and that of its function."
    texts = [inspect.getdoc(cls) or ""]
    names = re.findall(r"`kdlab\.functional\.(\w+)`", texts[0]) + [getattr(cls, "term", None)]
    for f in (getattr(kd.functional, name, None) for name in names if isinstance(name, str) and name):
        text = inspect.getdoc(f) or ""
        if text not in texts: texts.append(text)
    return " ".join(re.sub(r"\s+", " ", t) for t in texts)


def sentences(text):
    "Sentences; the dots of names, numbers and abbreviations end none."
    return [x.strip() for x in re.split(r"(?<=[.!?])\s+(?=[A-Z`*½(])", text) if x.strip()]


def papers(text):
    "arXiv number, DOI or number at OpenReview: who and when, of every paper in a docstring."
    found = {}
    name = r"[A-Z][\w'’-]+"
    who = rf"({name}(?:(?:, {name})*,? (?:&|and) {name}|(?:, {name})+| et al\.)?,? \d{{4}})[ ,(]*(?:[\w. ]+, )?$"
    for m in SOURCE.finditer(text):
        before = re.search(who, text[:m.start()])
        n = m[1] or m[2] or m[3]
        if before or n not in found: found[n] = before[1] if before else ""
    return found


def link(n):
    "A link to an arXiv number, a DOI or a number at OpenReview."
    if not n[0].isdigit() or not {".", "/"} & set(n): return f"[openreview:{n}](https://openreview.net/forum?id={n})"
    return f"[doi:{n}](https://doi.org/{n})" if n.startswith("10.") else f"[arXiv:{n}](https://arxiv.org/abs/{n})"


def difference(text):
    "The sentences that compare paper, authors' code and us."
    about = re.compile(r"\b([Pp]apers?|[Aa]uthors|[Tt]heir (code|loss|measure)|[Tt]he code|[Ww]e)\b")
    kept = [x for x in sentences(text) if about.search(x) and not x.startswith(("Raises", "Called"))]
    return " ".join(kept)


def equation(cls):
    try: return made(cls).equation()
    except Exception: return ""


WAYS = {"schemes": "teacher_assistants born_again stage_wise mutual early_exits Teachers", "transfer": "Mixup Curriculum"}


def ways():
    "Paper, name and difference of everything that is no loss: the schemes, and what a student is shown."
    named = [("kd.distill", kd.distill), ("kd.paraphraser", kd.paraphraser)]
    named += [(f"kd.{room}.{name}", getattr(getattr(kd, room), name)) for room, names in WAYS.items() for name in names.split()]
    for name, what in named:
        doc = re.sub(r"\s+", " ", inspect.getdoc(what))
        links = "; ".join(f"{who} {link(n)}".strip() for n, who in papers(doc).items())
        yield [links, f"`{name}`", escape(sentences(doc)[0]), escape(difference(doc)) or "-"]


def escape(text): return text.replace("|", "\\|").replace("\n", " ")


def table(header, rows):
    return "\n".join("| " + " | ".join(r) + " |" for r in [header, ["---"] * len(header), *rows])


def text():
    found = list(classes())
    probed = {c: properties(c) for c in found}
    rows = [[f"`{c.__name__}`", *(cell(p[k]) for k in COLUMNS)] for c, p in probed.items() if p]
    others = [f"`{c.__name__}`" for c, p in probed.items() if not p]
    index = []
    for c in found:
        doc = documents(c)
        links = "; ".join(f"{who} {link(n)}".strip() for n, who in papers(doc).items()) or "-"
        index.append([links, f"`{c.__name__}`", escape(equation(c)), escape(difference(doc)) or "-"])
    index.sort(key=lambda r: (r[0] == "-", re.sub(r"\W", "", r[0]).lower(), r[1]))
    broken = [c.__name__ for c, p in probed.items() if p and p["takes"] == "logits" and not p["permutation"]]
    assert not broken, f"classes may be permuted, but not for {broken}"
    return f"""# Every loss, and what it does

Made by `python docs/loss_table.py`: each property was found by trying the loss on random numbers, each paper and difference
is a sentence of a docstring. Empty means no.

## Loss x property

{table(["loss", *COLUMNS.values()], rows)}

"A shift" adds a number to all logits of a row (for any loss on logits, permuting the classes changes nothing). "Couples the
batch": the value of a batch is not the mean of the values of its halves, so micro-batches and data parallel give another
loss. `none`: a value for each row, sample or token can be had (`reduction="none"`). Wrappers were tried around `SoftKL`.
{("Not tried, because they need arguments of their own: " + ", ".join(others) + ".") if others else ""}

## Paper, class, equation, difference

{table(["paper", "class", "as it is written here", "paper, authors' code, here"], index)}

## Ways to distil: paper, function, difference

{table(["paper", "function", "what it does", "paper, here"], sorted(ways()))}
"""


if __name__ == "__main__":
    if ops._C is None: raise SystemExit(f"the compiled core is not built ({ops.core_missing}): KDLAB_EXT=1 pip install -e .")
    OUT.write_text(text(), encoding="utf-8")
