"""Masks against loops, the authors' running mean and torchao; SquareHead against loops; zeros that stay zeros;
checkpoints, bad input."""
from functools import partial
import copy, json, math, random
import numpy as np, pytest, torch
from conftest import ROOT, ran
from slmkit.compress.sparse_recovery import (by_dimension, counted, input_norms, mask_of, masks_of, prune, recovering,
    sparsity_figure, square_head, wanda, zeros)
from slmkit.core.fit import batches, collate, fit
from slmkit.core.settings import KitError
from slmkit.core.zoo import linear_layers

NB = ROOT/"nbs/compress/sparse_recovery.ipynb"
SHAPE = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0, bos_token_id=3, eos_token_id=1, attn_implementation="eager",
    initializer_range=.3)

def llama(seed=0, **more):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **more})).eval()

def rows(n=12, seed=0):
    rng = random.Random(seed)
    out = [[3] + [rng.randrange(5, 40) for _ in range(rng.randint(3, 9))] for _ in range(n)]
    return [dict(input_ids=i + [7], labels=[-100]*len(i) + [7]) for i in out]

@pytest.fixture
def data(): return [collate(rows()[i:i + 4], 0) for i in (0, 4, 8)]

# ---- masks

def by_hand(weight, norm, sparsity, group=0):
    "The rule written out: in each row (or group) of |w|·norm the int(size·sparsity) lowest go."
    keep = np.ones(weight.shape, bool)
    for r, row in enumerate(weight):
        step = group or len(row)
        for at in range(0, len(row), step):
            scored = sorted((abs(row[j])*norm[j], j) for j in range(at, at + step))
            for _, j in scored[:int(step*sparsity)]: keep[r, j] = False
    return keep

@pytest.mark.parametrize("sparsity", [0., .3, .5, .75, .9])
def test_masks_equal_the_rule_written_out(sparsity):
    rng = np.random.default_rng(1)
    w, norm = rng.normal(size=(7, 20)), rng.random(20)*9
    for group in (0, 4, 10):
        got = mask_of(wanda(torch.tensor(w), torch.tensor(norm)), sparsity, group)
        assert (got.numpy() == by_hand(w, norm, sparsity, group)).all()
    assert (mask_of(wanda(torch.tensor(w), torch.tensor(norm)), sparsity).sum(1) == 20 - int(20*sparsity)).all()

def test_of_equals_the_first_goes():
    assert mask_of(torch.ones(2, 4), .5).tolist() == [[False, False, True, True]]*2

def test_norms_equal_the_authors_running_mean_and_padding_is_left_out(data):
    model, heard = llama(), {}
    def hook(name): return lambda m, args: heard.setdefault(name, []).append(args[0])
    hooks = [m.register_forward_pre_hook(hook(n)) for n, m in linear_layers(model).items()]
    with torch.no_grad():
        for b in data: model.base_model(b["input_ids"], b["attention_mask"])
    for h in hooks: h.remove()
    norms = input_norms(model, data)
    assert set(norms) == set(heard) and len(norms) == 14
    for name, calls in heard.items():
        mean, samples, total = 0., 0, 0.
        for b, x in zip(data, calls):
            for i in range(len(x)):  # one row at a time, as WrappedGPT.add_batch does
                tokens = x[i][b["attention_mask"][i] == 1].double()
                mean = mean*samples/(samples + 1) + (tokens**2).sum(0)/(samples + 1)
                samples += 1
                for t in tokens: total = total + t**2
        assert torch.allclose(norms[name].double(), total.sqrt(), rtol=1e-5)
        w = linear_layers(model)[name].weight.detach()
        theirs = w.double().abs()*mean.sqrt()
        assert torch.equal(mask_of(theirs, .75), masks_of(model, .75, norms)[name])

def test_torchs_own_pruning_gives_the_magnitude_mask():
    from torch.nn.utils import prune as peer
    model = llama()
    for name, m in linear_layers(model).items():
        for r in range(0, len(m.weight), 5):
            row = torch.nn.Module()
            row.w = torch.nn.Parameter(m.weight[r].detach().clone())
            peer.l1_unstructured(row, "w", int(.7*m.weight.shape[1]))
            assert torch.equal(row.w_mask.bool(), masks_of(model, .7)[name][r])

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", [None, 4])
def test_torchao_by_its_own_convention(block):
    """Its sparsifier takes the squared norm and compares over the whole layer, as one long row; its 2:4 blocks are
    groups of four."""
    peer = pytest.importorskip("torchao.sparsity")
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(20, 8)), torch.randn(30, 20)*torch.rand(20)*5
    w = net[0].weight.detach().clone()
    sparsifier = peer.WandaSparsifier(sparsity_level=.6, semi_structured_block_size=block)
    sparsifier.prepare(net, [dict(tensor_fqn="0.weight")])
    net(x)
    sparsifier.step()
    sparsifier.squash_mask()
    scores = wanda(w, x.pow(2).sum(0))
    ours = mask_of(scores, .5, 4) if block else mask_of(scores.reshape(1, -1), .6).view_as(w)
    assert torch.equal(net[0].weight != 0, ours)

# ---- held masks

def test_masked_weights_stay_exactly_zero_while_all_others_learn(data):
    model = llama()
    masks = masks_of(model, .6, input_norms(model, data))
    before = copy.deepcopy(model)
    student = prune(copy.deepcopy(model), masks)
    kept = {n: m.weight.detach().clone() for n, m in linear_layers(student).items()}
    stream = batches(rows(40), 8, 0, random.Random(0))
    h = fit(student, recovering(model, "layers"), stream, steps=12, lr=.1, progress=False)
    assert all((m.weight[~masks[n]] == 0).all() for n, m in linear_layers(student).items())
    moved = torch.cat([(m.weight != kept[n])[masks[n]] for n, m in linear_layers(student).items()])
    assert moved.float().mean() > .9  # all but those behind a head or a channel that lost every other weight
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))  # the teacher is left alone
    assert zeros(student) == pytest.approx(sum((~m).sum().item() for m in masks.values())/sum(m.numel()
            for m in masks.values()))
    free = fit(copy.deepcopy(student), recovering(model, "labels"), stream, steps=2, lr=.1, progress=False)
    assert free.steps == 2

def test_a_copy_is_free_again(data):
    model = llama()
    copied = copy.deepcopy(prune(copy.deepcopy(model), masks_of(model, .5)))
    fit(copied, recovering(model, "labels"), batches(rows(40), 8, 0, random.Random(0)), steps=2, lr=.1, progress=False)
    assert zeros(copied) < .01

def test_counts():
    model = llama()
    masks = masks_of(model, .75)
    whole, kept = sum(m.numel() for m in masks.values()), sum(int(m.sum()) for m in masks.values())
    c, rest = counted(model, masks), model.num_parameters() - whole
    assert whole == sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert c == dict(bytes_dense=2*model.num_parameters(), bytes_sparse=2*(rest + kept) + math.ceil(whole/8),
        macs_dense=whole, macs_sparse=kept)
    assert counted(model, masks, width=4)["bytes_dense"] == 4*model.num_parameters()

# ---- the loss

def states(seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda scale: torch.randn(3, 5, 4, generator=g, dtype=torch.float64)*scale
    return [make(k) for k in (1, 4, 9)], [make(k) for k in (1, 6, 20)], torch.tensor([[1]*5, [1, 1, 1, 0, 0],
            [1, 1, 0, 0, 0]]).bool()

def test_square_head_written_out():
    student, teacher, here = states()
    want = 0.
    for s, t in zip(student, teacher):
        error = size = 0.
        for i in range(3):
            for j in range(5):
                if here[i, j]:
                    for k in range(4):
                        error += (s[i, j, k].item() - t[i, j, k].item())**2
                        size += t[i, j, k].item()**2
        want += error/size/3
    assert square_head(student, teacher, here).item() == pytest.approx(want, rel=1e-12)

def test_square_head_does_not_hear_volume_or_padding_and_its_gradient_is_right():
    student, teacher, here = states(1)
    base = square_head(student, teacher, here)
    louder = square_head([7*s for s in student], [7*t for t in teacher], here)
    for x in student + teacher: x[~here] = 1e6
    assert torch.allclose(base, louder) and torch.allclose(base, square_head(student, teacher, here))
    assert square_head(teacher, teacher, here) == 0
    assert torch.allclose(square_head([0*t for t in teacher], teacher, here), torch.ones(1).double())
    student, teacher, here = states(2)
    f = lambda *s: square_head(s, teacher, here)
    assert torch.autograd.gradcheck(f, [s.requires_grad_() for s in student])

def test_by_dimension_written_out():
    student, teacher, here = states(3)
    want = []
    for s, t in zip(student, teacher):
        for k in range(4):
            ts, ss = t[here][:, k].numpy(), s[here][:, k].numpy()
            want.append(((ss - ts)**2).mean()/(ts.var(ddof=1) + 1e-6))
    assert by_dimension(student, teacher, here).item() == pytest.approx(np.mean(want), rel=1e-12)
    moved = [t + 5 for t in teacher]  # what is the same for every word is not what the variance measures
    assert by_dimension([s + 5 for s in student], moved, here).item() == pytest.approx(np.mean(want), rel=1e-9)

def test_recovery_losses_by_hand(data):
    teacher, student, b = llama(0), llama(1), data[0]
    here = b["attention_mask"] == 1
    with torch.no_grad():
        t, s = (m(**b, output_hidden_states=True) for m in (teacher, student))
        loss = {kind: recovering(teacher, kind, .3)(student, b).item()
            for kind in ("labels", "logits", "layers", "dimensions")}
    assert loss["labels"] == pytest.approx(s.loss.item())
    gaps = []
    for i in range(len(here)):
        for j in range(1, here.shape[1]):
            if b["labels"][i, j] >= 0:
                p, q = (x.logits[i, j - 1].double().softmax(-1) for x in (t, s))
                gaps.append((p*(p/q).log()).sum().item())
    assert len(gaps) == 4 and loss["logits"] == pytest.approx(s.loss.item() + .3*np.mean(gaps), rel=1e-5)
    assert loss["layers"] == pytest.approx(s.loss.item() + .3*square_head(s.hidden_states[1:], t.hidden_states[1:],
            here).item(), rel=1e-6)
    assert loss["dimensions"] == pytest.approx(s.loss.item() + .3*by_dimension(s.hidden_states[1:], t.hidden_states[1:],
            here).item(), rel=1e-6)
    with torch.no_grad():
        assert recovering(student, "layers")(student, b).item() == pytest.approx(s.loss.item(), rel=1e-6)

def test_the_control_teacher_reads_another_row(data):
    teacher, student, b = llama(0), llama(1), data[0]
    moved = {k: b[k].roll(1, 0) for k in ("input_ids", "attention_mask")}
    here = b["attention_mask"] == 1
    with torch.no_grad():
        t, s = teacher(**moved, output_hidden_states=True), student(**b, output_hidden_states=True)
        got = recovering(teacher, "layers", other=1)(student, b).item()
    assert got == pytest.approx(s.loss.item() + square_head(s.hidden_states[1:], t.hidden_states[1:], here).item(),
        rel=1e-6)
    assert got > recovering(teacher, "layers")(teacher, b).item()

# ---- bad input

def test_bad_input():
    from transformers import GPT2Config, GPT2LMHeadModel
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(KitError, match="a GPT2LMHeadModel keeps its weights in no nn.Linear") as e: linear_layers(gpt)
    assert "\n" not in str(e.value)
    with pytest.raises(KitError, match="no whole number of groups of 5"): masks_of(llama(), .5, group=5)
    with pytest.raises(KitError, match="no kind 'logit': did you mean"): recovering(None, "logit")

# ---- the notebook

CLAIMS = {"layers-beat-labels", "layers-beat-logits", "inputs-choose-better", "layers-matter-at-high-sparsity",
          "dimensions-beat-layers"}
run = partial(ran, NB)

@pytest.mark.slow
def test_gpu_path_on_a_tiny_checkpoint_and_a_file(tmp_path, torch_pool):
    from slmkit.toyland.tokenizer import build_tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM
    tok = build_tokenizer()
    tok.save_pretrained(tmp_path/"qwen")
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "vocab_size": len(tok)})).save_pretrained(tmp_path/"qwen")
    mine = tmp_path/"mine.jsonl"  # split by the checksums of its inputs
    mine.write_text("\n".join(json.dumps(dict(input=f"after {i} comes", label=f"{i + 1}")) for i in range(100)),
        encoding="utf-8")
    found = run(tmp_path, torch_pool, profile="gpu", model=str(tmp_path/"qwen"), data=str(mine), steps=2,
        sparsity=.5, group=4)
    assert set(found) == CLAIMS and all(math.isfinite(v) for r in found.values() for v in r["arms"].values())
    assert found["layers-beat-labels"]["arms"]["sparsity"] == .5

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    # whose arms are slow
    assert one == two and set(one) == CLAIMS - {"layers-matter-at-high-sparsity", "dimensions-beat-layers"}

def test_figure_needs_no_run():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ways = ("layers", "logits", "labels", "unrecovered")
    arms = {f"{w}{end}": .5 for w in ways for end in ("", "_at_0.5", "_at_0.75")} | dict(teacher=.9, sparsity=.9)
    fig, ax = plt.subplots()
    sparsity_figure([dict(arms=arms)]*2, ax)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["100%", "50%", "25%", "10%"]
    plt.close(fig)
