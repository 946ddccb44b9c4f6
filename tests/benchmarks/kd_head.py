"The head of `distill.kd_head` beside TRL's and Liger's losses: the same inputs, numbers compared, then the clock."
import importlib.util, os, shutil
from unittest.mock import patch
import torch
from common import machine, options, ratio, show, spread
from slmkit.core.measure import medians, peak_memory_mb, timed
from slmkit.core.settings import KitError
from slmkit.distill.kd_head import kd_head, sizes

CHUNKS = 64, 128, 256, 512, 1024

def draw(tokens, vocab, student, teacher):
    "Random hidden states and heads (student, student, teacher, teacher): the student holds a part of the teacher's."
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(tokens, teacher, generator=g), torch.randn(vocab, teacher, generator=g)*3/teacher**.5
    return hidden[:, :student].clone(), head[:, :student].clone(), hidden, head

def gradients(loss, four):
    "(loss, gradient for the hidden states, gradient for the head) of the student, as a training step takes them."
    hidden, head = (t.detach().requires_grad_() for t in four[:2])
    value = loss(hidden, head, *four[2:])
    return value.detach(), *torch.autograd.grad(value, (hidden, head))

# ---- the ways

def products(hs, ws, ht, wt):
    "The floor: the matrix products of a distillation loss, some rows at a time, and nothing else."
    rows, _ = sizes(len(hs), len(ws))
    grad = torch.zeros_like(ws)
    for i in range(0, len(hs), rows):
        s, t = hs[i:i + rows] @ ws.T, ht[i:i + rows] @ wt.T
        s @ ws
        grad += t.T @ hs[i:i + rows]

def with_torch(loss, four):
    "`loss(*four)` with PyTorch's product in the place of `linear_product`, which may use another library."
    with patch("slmkit.distill.kd_head.linear_product", lambda a, b: a @ b.T): return loss(*four)

def liger(chunk, beta, compiled=False):
    "Liger's chunked loss."
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss as Loss
    loss = Loss(weight_hard_loss=0., weight_soft_loss=1., beta=beta, compiled=compiled, chunk_size=chunk)
    return lambda hs, ws, ht, wt: loss(hs, ws, ht, wt, torch.zeros(len(hs), dtype=torch.long))

def trl(beta):
    "TRL's loss on logits, and its loss on hidden states."
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss as chunked
    dense = GKDTrainer.generalized_jsd_loss
    mask = lambda hs: torch.ones(1, len(hs))
    return dict(trl_gkd=lambda hs, ws, ht, wt: dense(hs @ ws.T, ht @ wt.T, beta=beta),
        trl_chunked=lambda hs, ws, ht, wt: chunked(hs[None], ht[None], ws, wt, mask(hs), beta)[0])

def tuned(four, beta, compiled):
    "(name, loss): Liger at the chunk size that is fastest here."
    ways = {c: liger(c, beta, compiled) for c in CHUNKS}
    times = medians(timed({c: lambda f=f: gradients(f, four) for c, f in ways.items()}, 1))
    best = min(times, key=times.get)
    return f"liger_compiled_{best}" if compiled else f"liger_{best}", ways[best]

def peers(four, beta, compiled):
    "(name -> loss, what is missing)."
    missing = [p for p in ("trl", "liger_kernel") if not importlib.util.find_spec(p)]
    if compiled and not (shutil.which("g++") or shutil.which("clang++")):
        missing.append("C++ compiler")
        compiled = False
    found = {} if "trl" in missing else trl(beta)
    if "liger_kernel" not in missing:
        found |= dict(tuned(four, beta, c) for c in ([False, True] if compiled else [False]))
    return found, missing

# ---- equal first, then timed

def differences(ways, four):
    "name -> largest difference from our head, relative to the largest entry. KitError beyond 1e-5."
    ours, out = gradients(ways["slmkit"], four), {}
    for name, f in ways.items():
        out[name] = max(((x - y).abs().max()/y.abs().max()).item() for x, y in zip(gradients(f, four), ours))
        if not out[name] < 1e-5: raise KitError(f"kd_head: {name} is off by {out[name]:.1e}: not timed")
    return out

def bench(tokens=2048, vocab=4096, student=128, teacher=256, beta=.5, repeats=7, compiled=True, alone=False):
    "Seconds, peak MB and ratios to our head, round by round, as a dict: float32, one thread, time of the processor."
    four = draw(tokens, vocab, student, teacher)
    found, missing = ({}, []) if alone else peers(four, beta, compiled)
    ours = lambda *x: kd_head(*x, beta=beta)
    ways = dict(slmkit=ours, slmkit_torch=lambda *x: with_torch(ours, x), **found)
    equal = differences(ways, four)
    calls = {k: lambda f=f: gradients(f, four) for k, f in ways.items()}
    mb = {k: peak_memory_mb(f) for k, f in calls.items()}
    times = timed(calls | dict(products=lambda: products(*four)), repeats)
    shape = dict(tokens=tokens, vocab=vocab, student=student, teacher=teacher, beta=beta, repeats=repeats)
    seen = dict(seconds={k: spread(v) for k, v in times.items()}, peak_mb=mb,
        ratio={k: ratio(times, k, "slmkit") for k in times if k != "slmkit"},
        memory_ratio={k: v/mb["slmkit"] for k, v in mb.items() if k != "slmkit"})
    return shape | seen | dict(difference=equal, missing=missing) | machine()

parser = options(__doc__, tokens=2048, vocab=4096, student=128, teacher=256, beta=.5, repeats=7)
parser.add_argument("--eager", dest="compiled", action="store_false", help="no torch.compile, which needs a compiler")
parser.add_argument("--alone", action="store_true", help="no peers: our head and the bare matrix products")
if __name__ == "__main__": show(bench, parser)
