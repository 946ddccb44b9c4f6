"""Attention and value relations: against numpy head by head, finite differences, transformers' own attentions;
students narrow and cut, sentence embeddings, checkpoints, bad input."""
import json, math
import numpy as np, pytest, torch
from functools import partial
from pathlib import Path
from conftest import ran
from slmkit.core.fit import collate, fit, encode_texts
from slmkit.core.generate import predict_classes
from slmkit.core.settings import KitError
from slmkit.toyland.tokenizer import build_tokenizer
from slmkit.distill.attention_relations import (classifier, embed, embedding_loss, hidden_loss, hidden_states,
    minilm_loss, narrow_student, permuted_weights, qkv, qkv_layers, relation, relation_loss, sentence_embeddings,
    shallow_student, split_heads, with_linear_maps)

NB, MINILM = (Path(__file__).parents[1]/f"nbs/distill/attention_relations_repro{end}.ipynb" for end in ("", "_minilm"))

def bert(width=16, layers=2, heads=2, seed=0, vocab=40):
    from transformers import BertConfig, BertForMaskedLM
    torch.manual_seed(seed)
    model = BertForMaskedLM(BertConfig(vocab_size=vocab, hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=16, initializer_range=.5, hidden_dropout_prob=0.,
            attention_probs_dropout_prob=0., attn_implementation="eager"))
    return model.eval()

@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    rows = [dict(input_ids=torch.randint(5, 40, (n,), generator=g).tolist()) for n in (7, 4, 9)]
    return collate(rows, 0)

# ---- the peer: numpy, one text, one head and one word at a time

def softmax(z):
    e = np.exp(z - z.max())
    return e/e.sum()
def by_hand(pairs, mask, heads):
    """The loss of ((teacher x, teacher y), (student x, student y)) as float64[rows, length, width]; shares no line
    with the kit."""
    total, count = 0., 0
    for (tx, ty), (sx, sy) in pairs:
        part, count = 0., 0
        for row in range(len(tx)):
            real = [j for j in range(mask.shape[1]) if mask[row, j]]
            for i in real:
                for h in range(heads):
                    cut = lambda x, j: x[row, j, h*(x.shape[2]//heads):(h + 1)*(x.shape[2]//heads)]
                    p, q = (softmax(np.array([cut(x, i) @ cut(y, j)/math.sqrt(x.shape[2]//heads) for j in real]))
                        for x, y in ((tx, ty), (sx, sy)))
                    part += (p*np.log(p/q)).sum()/heads
                count += 1
        total += part/count
    return total

def ours(pairs, mask, heads):
    cut = lambda x: split_heads(x, heads)
    return sum(relation_loss(relation(cut(tx), cut(ty), mask), relation(cut(sx), cut(sy), mask), mask)
        for (tx, ty), (sx, sy) in pairs)

def draw(seed=0, heads=3):
    g = torch.Generator().manual_seed(seed)
    x = lambda width: torch.randn(3, 5, width, generator=g, dtype=torch.float64)
    mask = torch.tensor([[1]*5, [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    tq, tk, tv, q, k, v = *(x(4*heads) for _ in range(3)), *(x(2*heads) for _ in range(3))
    return [((tq, tk), (q, k)), ((tv, tv), (v, v))], mask

@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_numpy_head_by_head(seed):
    pairs, mask = draw(seed)
    want = by_hand([[[x.numpy() for x in side] for side in pair] for pair in pairs], mask.numpy(), 3)
    assert want > .1 and ours(pairs, mask, 3).item() == pytest.approx(want, rel=1e-12)

def test_gradients_equal_finite_differences_of_numpy():
    pairs, mask = draw(3)
    (t1, (q, k)), (t2, (v, _)) = pairs
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    ours([(t1, (leaves[0], leaves[1])), (t2, (leaves[2], leaves[2]))], mask, 3).backward()
    def value(xs):
        return by_hand([(tuple(x.numpy() for x in t1), (xs[0], xs[1])), (tuple(x.numpy() for x in t2), (xs[2], xs[2]))],
            mask.numpy(), 3)
    rng, eps = np.random.default_rng(0), 1e-6
    for leaf, at in zip(leaves, range(3)):
        for _ in range(12):
            spot = tuple(rng.integers(0, s) for s in leaf.shape)
            up, down = ([x.numpy().copy() for x in (q, k, v)] for _ in range(2))
            up[at][spot] += eps
            down[at][spot] -= eps
            assert leaf.grad[spot].item() == pytest.approx((value(up) - value(down))/(2*eps), abs=1e-8)

def test_gradcheck():
    pairs, mask = draw(4)
    (t1, (q, k)), (t2, (v, _)) = pairs
    loss = lambda q, k, v: ours([(t1, (q, k)), (t2, (v, v))], mask, 3)
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in (q, k, v)])

def test_padding_changes_nothing(batch):
    teacher, student = bert(), bert(8, 1, seed=1)
    loss = minilm_loss(teacher, teacher)
    alone = [loss(student, collate([dict(input_ids=row[m == 1].tolist())], 0)).item()
        for row, m in zip(batch["input_ids"], batch["attention_mask"])]
    sizes = batch["attention_mask"].sum(1).tolist()
    # a mean over words, not over texts
    assert loss(student, batch).item() == pytest.approx(np.average(alone, weights=sizes), rel=1e-5)
    wider = {k: torch.nn.functional.pad(v, (0, 6)) for k, v in batch.items()}
    assert loss(student, wider).item() == pytest.approx(loss(student, batch).item(), rel=1e-5)

def test_a_copy_has_nothing_to_learn_and_a_turn_of_the_values_is_no_change(batch):
    teacher = bert()
    turned = bert()
    turned.load_state_dict(teacher.state_dict())
    assert abs(minilm_loss(teacher, teacher)(turned, batch)) < 1e-6
    value, turn = qkv_layers(turned)[-1][2], torch.linalg.qr(torch.randn(8, 8))[0]
    with torch.no_grad():
        for h in (slice(0, 8), slice(8, 16)):
            value.weight[h] = turn @ value.weight[h]
            value.bias[h] = turn @ value.bias[h]
    assert abs(minilm_loss(teacher, teacher)(turned, batch)) < 1e-5
    # its next matrix was not turned back
    assert not torch.allclose(hidden_states(teacher, batch)[-1], hidden_states(turned, batch)[-1], atol=1e-2)

# ---- what is read of a model

def models():
    from transformers import (BertConfig, BertModel, DistilBertConfig, DistilBertModel, ElectraConfig, ElectraModel,
        RobertaConfig, RobertaModel)
    shape = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        attn_implementation="eager")
    out = [BertModel(BertConfig(**shape)), RobertaModel(RobertaConfig(**shape)),
        ElectraModel(ElectraConfig(embedding_size=8, **shape)), DistilBertModel(DistilBertConfig(vocab_size=40, dim=16,
            n_layers=2, n_heads=2, hidden_dim=16, attn_implementation="eager"))]
    return [m.eval() for m in out]

@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("layer", [0, -1])
def test_attention_equals_transformers_own(at, layer, batch):
    torch.manual_seed(at)
    model = models()[at]
    for p in model.parameters():
        if p.ndim > 1: torch.nn.init.normal_(p, std=.4)  # sharp: at the usual scale every attention is nearly even
    with torch.no_grad():
        q, k, v = qkv(model, batch, layer)
        theirs = model(**batch, output_attentions=True).attentions[layer]
    here = batch["attention_mask"] == 1
    got = relation(q, k, batch["attention_mask"]).exp()
    assert torch.allclose(got.transpose(1, 2)[here], theirs.transpose(1, 2)[here], atol=1e-5) and got.amax() > .5
    assert v.shape == q.shape == (3, 2, 9, 8)

def test_no_hook_is_left_even_after_an_error(batch):
    model = bert()
    qkv(model, batch)
    with pytest.raises(Exception): qkv(model, dict(batch, input_ids=batch["input_ids"] + 10_000))
    assert not any(m._forward_hooks for m in model.modules())

def test_heads_are_cut_as_transformers_cuts_them():
    x = torch.randn(2, 5, 12)
    assert torch.equal(split_heads(x, 3)[1, 2, 4], x[1, 4, 8:12])

# ---- students, baselines, control

def test_hidden_loss_by_hand(batch):
    teacher, student = bert(16, 4, seed=1), with_linear_maps(bert(8, 2, seed=2), bert(16, 4, seed=1))
    with torch.no_grad():
        theirs, ours_ = hidden_states(teacher, batch), hidden_states(student, batch)
        total = []
        for t, o, b in zip((theirs[0], theirs[2], theirs[4]), ours_, student.maps):
            rows = [((b(o[r, i]) - t[r, i])**2).mean() for r in range(3)
                for i in range(9) if batch["attention_mask"][r, i]]
            total.append((sum(rows)/len(rows)).item())
        assert hidden_loss(teacher)(student, batch).item() == pytest.approx(sum(total)/3, rel=1e-5)

def test_maps_learn_with_the_student_and_the_teacher_stays(batch):
    teacher = bert(16, 2, seed=1)
    student = with_linear_maps(bert(8, 1, seed=2), teacher)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (teacher, student)]
    h = fit(student, hidden_loss(teacher), iter([batch]*40), steps=40, lr=1e-2, progress=False)
    assert h.loss[-1] < .7*h.loss[0] and all(torch.equal(v, teacher.state_dict()[k]) for k, v in before[0].items())
    assert all(not torch.equal(before[1][k], student.state_dict()[k]) for k in before[1] if k.startswith("maps"))

@pytest.mark.parametrize("values", [False, True])
def test_copying_nears_the_teacher(batch, values):
    teacher, student = bert(16, 2, seed=1), bert(8, 1, seed=2)
    h = fit(student, minilm_loss(teacher, teacher if values else None), iter([batch]*80), steps=80, lr=1e-2,
            progress=False)
    assert h.loss[-1] < .5*h.loss[0]

def test_the_pieces_of_the_loss_add_up_and_the_layer_counts(batch):
    teacher, odd, student = bert(seed=1), bert(seed=3), bert(8, 1, seed=2)
    value = lambda t, v, layer=-1: minilm_loss(t, v, layer)(student, batch).item()
    attention = value(teacher, None)
    with torch.no_grad(): (*_, tv), (*_, v) = qkv(odd, batch), qkv(student, batch)
    mask = batch["attention_mask"]
    values = relation_loss(relation(tv, tv, mask), relation(v, v, mask), mask).item()
    assert value(teacher, odd) == pytest.approx(attention + values, rel=1e-5)
    assert value(teacher, teacher) != value(teacher, odd) and value(teacher, teacher, 0) != value(teacher, teacher)

def test_student_is_half_as_wide_and_as_deep_as_its_teacher():
    teacher = bert(16, 4)
    student = narrow_student(teacher, seed=1)
    c = student.config
    assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.vocab_size) == (8, 4, 2, 40)
    c = narrow_student(teacher, 12, 3).config
    assert (c.hidden_size, c.num_hidden_layers) == (12, 3)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), narrow_student(teacher, seed=1).parameters()))

def test_a_width_that_heads_do_not_share_is_refused():
    with pytest.raises(KitError, match="width of 7 can't be split over 2 heads") as e: narrow_student(bert(), 7)
    assert "\n" not in str(e.value)

def test_an_architecture_without_known_places_is_refused():
    from transformers import T5Config, T5EncoderModel
    with pytest.raises(KitError, match="no place is known where a t5") as e:
        qkv_layers(T5EncoderModel(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)))
    assert "\n" not in str(e.value)

def test_permuted_weights_keeps_the_numbers_and_loses_their_places():
    model = bert()
    other = permuted_weights(model, 1)
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
        if a.ndim > 1: assert not torch.equal(a, b), name
    assert torch.equal(other.bert.embeddings.word_embeddings.weight,
        permuted_weights(model, 1).bert.embeddings.word_embeddings.weight)

def test_classifier_takes_the_students_layers(batch):
    student = bert(8, 1, seed=2)
    model = classifier(student, 3).eval()
    assert torch.allclose(hidden_states(model, batch)[-1], hidden_states(student, batch)[-1])
    assert model(**batch).logits.shape == (3, 3)
    rows = [dict(input_ids=r[m == 1].tolist()) for r, m in zip(batch["input_ids"], batch["attention_mask"])]
    one_by_one = [model(input_ids=torch.tensor([r["input_ids"]])).logits.argmax().item() for r in rows]
    assert predict_classes(model, rows, 0, batch_size=2) == one_by_one

# ---- students cut out of their teacher, sentence embeddings

def test_a_cut_student_runs_the_layers_that_it_keeps(batch):
    teacher = bert(16, 4, seed=1)
    for m in teacher.modules():
        if isinstance(m, torch.nn.Dropout): m.p = .1
    cut = shallow_student(teacher, [1, 3])
    x = teacher.bert.embeddings(batch["input_ids"])
    mask = (1. - batch["attention_mask"][:, None, None].float())*torch.finfo(torch.float32).min
    for i in (1, 3):
        x = teacher.bert.encoder.layer[i](x, mask)
        x = x[0] if isinstance(x, tuple) else x
    here = batch["attention_mask"] == 1
    assert torch.allclose(hidden_states(cut.train(), batch)[-1][here], x[here], atol=1e-5)  # without dropout
    assert len(teacher.bert.encoder.layer) == 4 and cut.config.num_hidden_layers == 2
    frozen = {n for n, p in cut.named_parameters() if not p.requires_grad}
    assert frozen and all("embeddings" in n or "decoder" in n for n in frozen)

def test_layers_that_a_teacher_lacks_are_refused():
    with pytest.raises(KitError, match=r"layers \[1, 4\] of a teacher that has 4") as e:
        shallow_student(bert(16, 4), [1, 4])
    assert "\n" not in str(e.value)

def test_sentence_embeddings_are_means_over_words_of_length_one(batch):
    model = bert(seed=2)
    found = sentence_embeddings(model, batch)
    for row, ids, mask in zip(found, batch["input_ids"], batch["attention_mask"]):
        alone = collate([dict(input_ids=ids[mask == 1].tolist())], 0)
        mean = hidden_states(model, alone)[-1][0].mean(0)
        assert torch.allclose(row, mean/mean.norm(), atol=1e-5)

def test_embedding_loss_is_two_less_two_cosines(batch):
    teacher, student = bert(seed=2), bert(seed=3)
    cosines = torch.cosine_similarity(sentence_embeddings(teacher, batch), sentence_embeddings(student, batch))
    assert embedding_loss(teacher)(student, batch).item() == pytest.approx((2 - 2*cosines).mean().item(), rel=1e-5)
    assert abs(embedding_loss(teacher)(teacher, batch)) < 1e-6

def test_a_student_as_wide_needs_no_map(batch):
    teacher = bert(16, 4, seed=1)
    assert hidden_loss(teacher)(teacher, batch) == 0
    here, cut = batch["attention_mask"] == 1, shallow_student(teacher, [1, 3])
    gaps = [((hidden_states(teacher, batch)[2*i] - hidden_states(cut, batch)[i])[here]**2).mean() for i in range(3)]
    assert hidden_loss(teacher)(cut, batch).item() == pytest.approx((sum(gaps)/3).item(), rel=1e-5)

def test_texts_are_embedded_in_their_order(tiny_bert):
    from transformers import AutoModel, AutoTokenizer
    model, tok = AutoModel.from_pretrained(tiny_bert).eval(), AutoTokenizer.from_pretrained(tiny_bert)
    texts = ["a b c d e", "a", "b c"]
    rows = encode_texts(tok, texts)
    with torch.no_grad(): alone = torch.cat([sentence_embeddings(model, collate([r], 0)) for r in rows])
    assert torch.allclose(embed(model, tok, texts), alone, atol=1e-5)

# ---- the notebook

run = partial(ran, NB)

@pytest.fixture
def tiny_bert(tmp_path):
    "A BERT checkpoint with tokens of its own at both ends, as real ones have them."
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz",
            *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")])}
    t = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=t, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]").save_pretrained(tmp_path/"bert")
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=512)
    BertForMaskedLM(BertConfig(vocab_size=len(vocab), **shape)).save_pretrained(tmp_path/"bert")
    return str(tmp_path/"bert")

@pytest.mark.slow
def test_a_checkpoint_of_ones_own_is_taught_and_judged(tmp_path, torch_pool, tiny_bert):
    found = run(tmp_path, torch_pool, profile="smoke", model=tiny_bert, data="topics", steps=2, n=20)
    assert set(found) == {"value-relations-help"}
    arms = found["value-relations-help"]["arms"]
    assert set(arms) >= {"relations", "attention", "permuted_values"} and all(map(math.isfinite, arms.values()))

@pytest.mark.slow
@pytest.mark.parametrize("notebook, claims", [(NB, 1), (MINILM, 3)])
def test_same_seed_same_record(tmp_path, torch_pool, notebook, claims):
    one, two = (ran(notebook, tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and len(one) == claims

def test_rows_have_both_marks(tiny_bert):
    from transformers import AutoTokenizer
    tok = build_tokenizer()
    assert encode_texts(tok, ["ana ."])[0]["input_ids"] == [tok.bos_token_id, *tok("ana .")["input_ids"]]
    assert tok.eos_token_id == encode_texts(tok, ["ana ."])[0]["input_ids"][-1]
    real = AutoTokenizer.from_pretrained(tiny_bert)
    assert encode_texts(real, ["a b"])[0]["input_ids"] == [2, 5, 6, 3]
    assert len(encode_texts(real, ["a b c d e"], 4)[0]["input_ids"]) == 4
    assert len(encode_texts(tok, ["ana and ben see a dog ."], 5)[0]["input_ids"]) == 5
