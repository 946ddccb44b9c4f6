"Many seeds trained together (`core.stacked`) beside the same seeds one by one: weights compared, then the clock."
import copy
from common import draws, load, machine, options, ratio, rounds, same, show, spread
from slmkit.core.stacked import fit_many

def replicas(start, n, batches, stacked, lr):
    "A function that trains fresh copies of a model when it is called, and gives them."
    models, how = [copy.deepcopy(start) for _ in range(n)], dict(steps=len(batches[0]), progress=False)
    def run():
        fit_many(models, lambda m, b: m(**b).loss, [iter(b) for b in batches[:n]], stacked, lr, **how)
        return models
    return run

def bench(model="lm-1m", n=10, rows=16, length=32, steps=10, repeats=5, lr=1e-3):
    "Seconds of n replicas one by one, of the same stacked, and of one alone, with ratios, as a dict."
    start = load(model)
    batches = [draws(start, rows, length, steps, seed) for seed in range(n)]
    ways = dict(stacked=(n, True), one_by_one=(n, False), one=(1, False))
    ready = lambda how: lambda: replicas(start, how[0], batches, how[1], lr)
    pairs = zip(*(ready(ways[k])()() for k in ("one_by_one", "stacked")))
    off = max(same(a, b, start, "seeds") for a, b in pairs)
    times = rounds({k: ready(how) for k, how in ways.items()}, repeats)
    shape = dict(model=model, replicas=n, rows=rows, length=length, steps=steps, repeats=repeats, difference=off)
    said = dict(ratio=ratio(times, "one_by_one", "stacked"), times_of_one=ratio(times, "stacked", "one"))
    return shape | said | dict(seconds={k: spread(v) for k, v in times.items()}) | machine()

parser = options(__doc__, model="lm-1m", n=10, rows=16, length=32, steps=10, repeats=5)
if __name__ == "__main__": show(bench, parser)
