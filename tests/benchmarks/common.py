"What the benchmarks share: options, models and batches, spreads and ratios, where and with what it was measured."
import argparse, json, os, platform, statistics, subprocess, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
import torch
from slmkit.core.measure import timed
from slmkit.core.settings import KitError, hardware
from slmkit.core.zoo import load_model

PACKAGES = "slmkit torch transformers tokenizers numpy trl liger-kernel accelerate".split()

def spread(values):
    "Median, least and most of some numbers."
    return dict(median=statistics.median(values), least=min(values), most=max(values))

def ratio(times, a, b):
    "How many times as long way `a` took as way `b`, round by round."
    return spread([x/y for x, y in zip(times[a], times[b])])

def load(name):
    "A zoo model or a folder, in training mode."
    return load_model(name, kind="causal" if name.startswith("lm") else "seq2seq")[0].train()

def versions():
    "The installed packages that matter, and Python."
    found = dict(python=platform.python_version())
    for name in PACKAGES:
        try: found[name] = version(name)
        except PackageNotFoundError: continue
    return found

def commit():
    "The commit of this checkout, or None where there is no git."
    here = Path(__file__).parent
    try: said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, encoding="utf-8")
    except OSError: return None
    return said.stdout.strip() or None

def machine():
    "Where and with what this was measured."
    load_now = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return dict(hardware=hardware(), load=load_now, cores=os.cpu_count(), machine=platform.machine(),
        versions=versions(), commit=commit())

# ---- models trained two ways

def draws(model, rows, length, steps, seed=0):
    "As many batches as steps: dicts of int64[rows, length] and labels."
    g, two = torch.Generator().manual_seed(seed), model.config.is_encoder_decoder
    ids = torch.randint(10, model.config.vocab_size, (steps, rows, length), generator=g)
    labels = ids[..., :8].clone() if two else ids.clone()
    if not two: labels[..., 0] = -100  # no decoder predicts the first token; the Trainer would count it
    mask = torch.ones_like(ids[0])
    return [dict(input_ids=x, attention_mask=mask, labels=y) for x, y in zip(ids, labels)]

def furthest(a, b):
    "The largest difference between two models' weights."
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))

def same(a, b, start, what):
    "How far trained weights are apart, in parts of how far training moved one; KitError where they are not equal."
    off = furthest(a, b)/furthest(a, start)
    if not off < .1: raise KitError(f"{what}: the weights are {off:.2g} of the way apart: not timed")
    return off

def rounds(ways, repeats):
    "name -> seconds of each round; `ways`: name -> function that prepares a run and gives the call that is timed."
    ready = {k: iter([make() for _ in range(repeats + 1)]) for k, make in ways.items()}
    return timed({k: lambda runs=runs: next(runs)() for k, runs in ready.items()}, repeats)

# ---- the command line

def options(about, **numbers):
    "A parser of `--name N` for each of `numbers`, its defaults."
    parser = argparse.ArgumentParser(description=about)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{default} otherwise")
    return parser

def checked(given):
    "The parsed options as a dict; KitError for a whole number below 1."
    low = [f"--{k} {v}" for k, v in vars(given).items() if type(v) is int and v < 1]
    if low: raise KitError(f"{low[0]} must be at least 1")
    return vars(given)

def show(benchmark, parser, argv=None):
    "Run a benchmark with the options of the command line and print what it gives as JSON."
    torch.set_num_threads(1)
    try: result = benchmark(**checked(parser.parse_args(argv)))
    except KitError as e: sys.exit(f"{parser.prog}: {e}")
    print(json.dumps(result, indent=1))
