"`core.decode` beside transformers' `generate`: the same model and prompts, tokens compared, then the clock."
import torch
from common import load, machine, options, ratio, show, spread
from slmkit.core.decode import decode, steps_class, stop_tokens
from slmkit.core.measure import timed
from slmkit.core.settings import KitError

def prompts(model, rows, length):
    "(input_ids, attention_mask) of random tokens, int64[rows, length]."
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (rows, length), generator=g).to(model.device)
    return ids, torch.ones_like(ids)

def theirs(model, ids, mask, new):
    "The new tokens of `generate`, as many as asked for."
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
        num_beams=1)
    return out[:, 1 if model.config.is_encoder_decoder else ids.shape[1]:]

@torch.no_grad()
def lead(model, ids, mask, tokens):
    "How far the likeliest logit leads the second when each of `tokens` is due: float[rows, new]."
    if model.config.is_encoder_decoder:
        start = torch.full_like(tokens[:, :1], model.config.decoder_start_token_id)
        given = torch.cat([start, tokens[:, :-1]], 1)
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=given).logits
    else: logits = model(input_ids=torch.cat([ids, tokens[:, :-1]], 1)).logits[:, ids.shape[1] - 1:]
    best = logits.topk(2, -1).values
    return best[..., 0] - best[..., 1]

def disagree(ours, theirs, lead, least=1e-4):
    """Rows whose tokens differ although no token up to the first difference was in doubt. Two ways of adding up the
    same numbers differ in the last bit, so tokens must be equal only where the likeliest leads by more than `least`."""
    first = (ours != theirs).long().argmax(1, keepdim=True)
    sure = torch.where(torch.arange(ours.shape[1], device=ours.device) <= first, lead, least*2).min(1).values > least
    return int(((ours != theirs).any(1) & sure).sum())

def race(model, rows, length, new, repeats):
    "Seconds and ratio of both ways for one model, after their tokens were found equal; KitError if they are not."
    ids, mask = prompts(model, rows, length)
    ways = dict(slmkit=lambda: decode(model, ids, mask, new), generate=lambda: theirs(model, ids, mask, new))
    a, b = ways["slmkit"](), ways["generate"]()
    bad = disagree(a, b, lead(model, ids, mask, b))
    if bad: raise KitError(f"generate: {bad} of {rows} rows differ from transformers' `generate`: not timed")
    times = timed(ways, repeats)
    return dict(rows=rows, seconds={k: spread(v) for k, v in times.items()}, ratio=ratio(times, "generate", "slmkit"))

def ready(name):
    "A model that never ends early: each way then makes the same number of tokens, one pass each."
    model = load(name).eval()
    if steps_class(model) is None: raise KitError(f"generate: {name}: `decode` leaves this model to `generate`")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, stop_tokens(model)[1]
    return model

def bench(models="lm-1m,t5-1m", rows="1,32", length=32, new=32, repeats=5):
    "Seconds and ratios as a dict, for each of `models` and number of rows at once, both given with commas between."
    sizes = [int(r) for r in rows.split(",") if r.strip().isdigit()]
    if not sizes or min(sizes) < 1: raise KitError(f"generate: --rows {rows} must be numbers above 0")
    runs = [dict(model=name) | race(model, n, length, new, repeats)
        for name in models.split(",") for model in [ready(name)] for n in sizes]
    return dict(length=length, new=new, repeats=repeats, runs=runs) | machine()

parser = options(__doc__, models="lm-1m,t5-1m", rows="1,32", length=32, new=32, repeats=5)
if __name__ == "__main__": show(bench, parser)
