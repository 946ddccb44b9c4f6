"`core.fit` beside the Trainer of transformers: the same batches, the same weights afterwards, then the clock."
import copy, importlib.util, tempfile
from functools import partial
import torch
from common import draws, load, machine, options, ratio, rounds, same, show, spread
from slmkit.core.fit import fit
from slmkit.core.stacked import lr_at

def ours(model, batches, lr):
    "Train by `core.fit`."
    fit(model, lambda m, b: m(**b).loss, iter(batches), steps=len(batches), lr=lr, progress=False)

def trainer(model, batches, lr):
    "A Trainer that makes the updates of `ours` when its `train()` is called."
    from transformers import PrinterCallback, Trainer, TrainingArguments
    class InOrder(Trainer):
        def get_train_dataloader(self): return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)
    quiet = dict(logging_strategy="no", save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True)
    args = TrainingArguments(tempfile.mkdtemp(), max_steps=len(batches), use_cpu=model.device.type == "cpu", **quiet)
    opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0., fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: lr_at(1., i/len(batches), .05))
    made = InOrder(model, args, optimizers=(opt, schedule))
    made.remove_callback(PrinterCallback)
    return made

def bench(model="lm-1m", rows=16, length=32, steps=20, repeats=5, lr=1e-3):
    "Seconds of `fit` and of the Trainer for the same updates, and their ratio, as a dict."
    start = load(model)
    batches, fresh = draws(start, rows, length, steps), lambda: copy.deepcopy(start)
    ways, out = dict(slmkit=lambda: partial(ours, fresh(), batches, lr)), {}
    missing = [] if importlib.util.find_spec("accelerate") else ["accelerate"]
    if not missing:
        one, two = fresh(), fresh()
        ours(one, batches, lr)
        trainer(two, batches, lr).train()
        out["difference"] = same(one, two, start, "fit")
        ways["trainer"] = lambda: trainer(fresh(), batches, lr).train
    times = rounds(ways, repeats)
    if not missing: out["ratio"] = ratio(times, "trainer", "slmkit")
    shape = dict(model=model, rows=rows, length=length, steps=steps, repeats=repeats)
    return shape | out | dict(seconds={k: spread(v) for k, v in times.items()}, missing=missing) | machine()

parser = options(__doc__, model="lm-1m", rows=16, length=32, steps=20, repeats=5)
if __name__ == "__main__": show(bench, parser)
