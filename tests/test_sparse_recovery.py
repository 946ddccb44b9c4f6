"""Masks against loops, the authors' running mean and torch; SparseGPT against the exact brain surgeon; SquareHead
against loops; zeros that stay zeros; bad input."""
import copy, math, random
import numpy as np, pytest, torch
from slmkit.compress.sparse_recovery import (CUTS, counted, first_calls, hold_masks, mask_of, prune_columns,
    prune_one_shot, recovering, run_layer, sparsegpt, square_head, wanda, zeros)
from slmkit.core.fit import batches, collate, fit
from slmkit.core.settings import KitError
from slmkit.core.trunk import decoder_layers
from slmkit.core.zoo import linear_layers

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
        got = mask_of(wanda(torch.tensor(w), torch.diag(torch.tensor(norm)**2)), sparsity, group)
        assert (got.numpy() == by_hand(w, norm, sparsity, group)).all()
    assert (mask_of(wanda(torch.tensor(w), torch.diag(torch.tensor(norm)**2)),
        sparsity).sum(1) == 20 - int(20*sparsity)).all()

def test_of_equals_as_many_go():
    assert mask_of(torch.ones(5, 8), .5).sum(1).tolist() == [4]*5
    assert mask_of(torch.ones(5, 8), .5, 4).view(-1, 4).sum(1).tolist() == [2]*10

def heard(model, data):
    "{name: inputs of each linear layer, padding left out, float64}, by hooks of this test's own."
    out, here = {}, []
    def hook(name): return lambda m, args: out.setdefault(name, []).append(args[0][here[-1]].double())
    hooks = [m.register_forward_pre_hook(hook(n)) for n, m in linear_layers(model).items()]
    with torch.no_grad():
        for b in data:
            here.append(b["attention_mask"] == 1)
            model.base_model(b["input_ids"], b["attention_mask"])
    for h in hooks: h.remove()
    return {n: torch.cat(x) for n, x in out.items()}

def test_grams_are_those_of_the_model_and_padding_is_left_out(data):
    model = llama()
    inputs, (name, layers) = heard(model, data), decoder_layers(model)
    with torch.no_grad():
        calls = first_calls(model, layers[0], data)
        for i, layer in enumerate(layers):
            grams, calls = run_layer(layer, calls)
            for n, gram in grams.items():
                x = inputs[f"{name}.{i}.{n}"]
                assert torch.allclose(gram.double(), x.T @ x, rtol=1e-4, atol=1e-5)

def test_wandas_masks_equal_the_authors_running_mean(data):
    model = llama()
    pruned = copy.deepcopy(model)
    masks = prune_one_shot(pruned, data, "wanda", .75)
    assert set(masks) == set(linear_layers(model)) and len(masks) == 14
    first = next(n for n in masks if "layers.0" in n and "q_proj" in n)  # below it nothing is pruned
    x = heard(model, data)[first]
    w, mean = linear_layers(model)[first].weight.detach(), 0.
    for k, token in enumerate(x): mean = mean*k/(k + 1) + token**2/(k + 1)  # as WrappedGPT.add_batch does
    assert torch.equal(mask_of(w.double().abs()*mean.sqrt(), .75), masks[first])
    assert torch.equal(linear_layers(pruned)[first].weight, w*masks[first])

def test_later_layers_are_scored_by_what_pruned_ones_give(data):
    model = llama()
    pruned = copy.deepcopy(model)
    masks = prune_one_shot(pruned, data, "wanda", .75)
    x = heard(pruned, data)
    name = next(n for n in masks if "layers.1" in n and "q_proj" in n)
    w = linear_layers(model)[name].weight.detach()
    assert torch.equal(masks[name], mask_of(w.abs()*x[name].pow(2).sum(0).sqrt().float(), .75))

def test_torchs_own_pruning_gives_the_magnitude_mask(data):
    from torch.nn.utils import prune as peer
    model = llama()
    masks = prune_one_shot(copy.deepcopy(model), data, "magnitude", .7)
    for name, m in linear_layers(model).items():
        for r in range(0, len(m.weight), 5):
            row = torch.nn.Module()
            row.w = torch.nn.Parameter(m.weight[r].detach().clone())
            peer.l1_unstructured(row, "w", int(.7*m.weight.shape[1]))
            assert torch.equal(row.w_mask.bool(), masks[name][r])

def test_only_the_layers_asked_for_are_pruned(data):
    model = llama()
    masks = prune_one_shot(model, data, "magnitude", .5, only=[1])
    assert masks and all("layers.1." in n for n in masks) and zeros(model) == pytest.approx(.25, abs=.01)

# ---- SparseGPT

def problem(rows=5, columns=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(60, columns, generator=g).double() @ torch.randn(columns, columns, generator=g).double()
    return torch.randn(rows, columns, generator=g).double(), x

def upper(gram): return torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)

def test_each_column_is_made_up_for_by_those_right_of_it():
    "After column j is decided, the columns right of it are the least-squares answer for what the left ones now say."
    w, x = problem()
    gram, keep = x.T @ x, torch.rand(5, 8, generator=torch.Generator().manual_seed(1)) > .4
    new, errors = prune_columns(w, upper(gram), keep)
    assert torch.equal(new != 0, keep)
    for r in range(len(w)):
        now = w[r].clone()
        for j in range(8):
            left = torch.cat([now[:j], torch.where(keep[r, j], now[j:j + 1], 0.)])
            assert errors[r, j].item() == pytest.approx(((now[j] - left[j])/upper(gram)[j, j]).item(), abs=1e-8)
            rest = torch.linalg.lstsq(x[:, j + 1:], x @ w[r] - x[:, :j + 1] @ left).solution if j < 7 else now[:0]
            now = torch.cat([left, rest])
        assert torch.allclose(new[r], now, atol=1e-6)

def test_blocks_change_nothing_but_when_a_mask_is_chosen():
    w, x = problem(4, 12)
    gram = x.T @ x
    H = gram + .01*gram.diag().mean()*torch.eye(12)
    whole = sparsegpt(w, gram, .5, block=12)
    scores = (w/upper(H).diag())**2
    keep = mask_of(scores.reshape(1, -1), .5).view_as(w)
    assert torch.allclose(whole, prune_columns(w, upper(H), keep)[0], atol=1e-8)
    pairs = sparsegpt(w, gram, .5, block=4)
    assert all((pairs[:, i:i + 4] == 0).sum() == 8 for i in (0, 4, 8))

def test_two_of_four_and_less_error_than_choosing_alone():
    for seed in range(4):
        w, x = problem(16, 24, seed)
        gram = x.T @ x
        cuts = {cut: f(w, gram, .5, 4) for cut, f in CUTS.items()}
        assert all(((c != 0).view(16, 6, 4).sum(-1) == 2).all() for c in cuts.values())
        lost = {cut: (x @ (c - w).T).pow(2).sum().item() for cut, c in cuts.items()}
        assert lost["sparsegpt"] < lost["wanda"] and lost["sparsegpt"] < lost["magnitude"]
        still = sparsegpt(w, gram, .5, 4, update=False)
        assert torch.equal(still != 0, cuts["sparsegpt"] != 0) and torch.equal(still[still != 0], w[still != 0])

def test_an_input_that_is_never_there_loses_its_weights():
    w, x = problem()
    x[:, 3] = 0
    assert (sparsegpt(w, x.T @ x, .25)[:, 3] == 0).all() and sparsegpt(w, x.T @ x, .25).isfinite().all()

# ---- held masks

def test_masked_weights_stay_exactly_zero_while_all_others_learn(data):
    model = llama()
    masks = prune_one_shot(copy.deepcopy(model), data, "wanda", .6)
    before = copy.deepcopy(model)
    student = hold_masks(copy.deepcopy(model), masks)
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
    masks = prune_one_shot(copy.deepcopy(model), data, "magnitude", .5)
    copied = copy.deepcopy(hold_masks(copy.deepcopy(model), masks))
    fit(copied, recovering(model, "labels"), batches(rows(40), 8, 0, random.Random(0)), steps=2, lr=.1, progress=False)
    assert zeros(copied) < .01

def test_counts(data):
    model = llama()
    masks = prune_one_shot(copy.deepcopy(model), data, "magnitude", .75)
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

def test_recovery_losses_by_hand(data):
    teacher, student, b = llama(0), llama(1), data[0]
    here = b["attention_mask"] == 1
    with torch.no_grad():
        t, s = (m(**b, output_hidden_states=True) for m in (teacher, student))
        loss = {kind: recovering(teacher, kind, .3)(student, b).item()
            for kind in ("labels", "logits", "layers")}
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

def test_bad_input(data):
    from transformers import GPT2Config, GPT2LMHeadModel
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(KitError, match="a GPT2LMHeadModel keeps its weights in no nn.Linear") as e: linear_layers(gpt)
    assert "\n" not in str(e.value)
    with pytest.raises(KitError, match="no groups of 5"): prune_one_shot(llama(), data, "wanda", .5, group=5)
    with pytest.raises(KitError, match="no kind 'logit': did you mean"): recovering(None, "logit")
