"""SmolLM2 on one core beside transformers, in CPU seconds, in turns: tokens read, decoding at 1 and 32 rows, and 4-shot
prompts that share their demonstrations. Needs the model: `slmkit zoo fetch smollm2-135m`."""
import time
import torch
from common import machine, options, ratio, show, spread
from generate import disagree, lead, prompts, theirs
from slmkit.core.answers import ending_scores, plain_scores
from slmkit.core.decode import decode, stop_tokens
from slmkit.core.measure import timed
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)

def ready(name, dtype):
    "A model that never ends early."
    model = load_model(name, kind="causal", device="cpu", dtype=DTYPES[dtype])[0].eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, stop_tokens(model)[1]
    return model

@torch.no_grad()
def reading(model, rows=8, length=64, repeats=3):
    "Tokens that the model's body reads in a CPU second."
    ids, mask = prompts(model, rows, length)
    times = timed(dict(body=lambda: model.model(input_ids=ids, attention_mask=mask)), repeats)
    return spread([ids.numel()/s for s in times["body"]])

def decoding(model, rows, length, new, repeats):
    "Seconds and ratio of `decode` and `generate`, after their tokens were found equal where no token was in doubt."
    ids, mask = prompts(model, rows, length)
    ways = dict(slmkit=lambda: decode(model, ids, mask, new), generate=lambda: theirs(model, ids, mask, new))
    a, b = ways["slmkit"](), ways["generate"]()
    least = 1e-3 if model.dtype == torch.float32 else .5  # what the last digits of a logit can turn
    bad = disagree(a, b, lead(model, ids, mask, b), least)
    if bad: raise KitError(f"real: {bad} of {rows} rows differ from transformers' `generate`: not timed")
    times = timed(ways, repeats)
    return dict(rows=rows, seconds={k: spread(v) for k, v in times.items()}, ratio=ratio(times, "generate", "slmkit"))

@torch.no_grad()
def whole_prompts(model, asked, labels, batch_size=16):
    "What one writes with transformers: prompts sorted by length, padded on the left, read whole."
    order, out = sorted(range(len(asked)), key=lambda i: len(asked[i])), torch.zeros(len(asked), len(labels))
    for at in range(0, len(order), batch_size):
        part = order[at:at + batch_size]
        longest = max(len(asked[i]) for i in part)
        ids = torch.tensor([[0]*(longest - len(asked[i])) + asked[i] for i in part])
        mask = torch.tensor([[0]*(longest - len(asked[i])) + [1]*len(asked[i]) for i in part])
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places, logits_to_keep=1).logits[:, -1]
        out[part] = logits.float().log_softmax(-1)[:, labels]
    return out

def sharing(model, rows, repeats, prefix=160, labels=6):
    "Seconds of `ending_scores` and of reading 4-shot prompts whole; `prefix` tokens are the demonstrations'."
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(10, model.config.vocab_size, (n,), generator=g).tolist()
    demos, words = draw(prefix), draw(labels)
    asked = [demos + draw(10 + i % 12) for i in range(rows)]
    said = [[[word] for word in words]]*rows
    ways = dict(slmkit=lambda: ending_scores(model, asked, said), whole=lambda: whole_prompts(model, asked, words))
    off = (ways["slmkit"]() - ways["whole"]()).abs().max().item()
    if model.dtype == torch.float32 and off > .01: raise KitError(f"real: scores differ by {off:.3g} nats: not timed")
    times = timed(ways, repeats)
    start = time.process_time()
    plain_scores(model, asked[:4], said[:4])
    pairs = (time.process_time() - start)*rows/4
    return dict(rows=rows, seconds={k: spread(v) for k, v in times.items()}, ratio=ratio(times, "whole", "slmkit"),
        pairs_ratio=pairs/spread(times["slmkit"])["median"], furthest_nats=off)

def bench(model="smollm2-135m", dtypes="float32,bfloat16", rows="1,32", length=32, new=24, shots=64, repeats=5):
    "Speeds and ratios as a dict, for each of `dtypes`; `rows` decoded at once, `shots` 4-shot prompts."
    runs = []
    for dtype in dtypes.split(","):
        if dtype not in DTYPES: raise KitError(f"real: no dtype {dtype!r}: there is {', '.join(DTYPES)}")
        net = ready(model, dtype)
        runs.append(dict(dtype=dtype, tokens_read_per_second=reading(net), sharing=sharing(net, shots, min(repeats, 2)),
            decoding=[decoding(net, int(r), length, new, repeats) for r in rows.split(",")]))
    return dict(model=model, length=length, new=new, repeats=repeats, runs=runs) | machine()

parser = options(__doc__, model="smollm2-135m", dtypes="float32,bfloat16", rows="1,32", length=32, new=24, shots=64,
    repeats=5)
if __name__ == "__main__": show(bench, parser)
