"""Cascades: curves against brute force, quantiles against numpy, FLOPs by hand, answers against full passes, bad
input, checkpoints."""
import itertools, math
import numpy as np, pytest, torch
from functools import partial
from pathlib import Path
from conftest import ran
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model
from slmkit.infer.cascades import (LEVELS, answered, area, deferral_curve, few_shot_head, first_layers, learned, mix,
    overlap, price, quantiles, scored, summary, with_tokens)

NB = Path(__file__).parents[1]/"nbs/infer/cascades_repro.ipynb"

@pytest.fixture(scope="module")
def t5(): return load_model("t5-1m", "cpu")
@pytest.fixture(scope="module")
def bert(): return load_model("bert-1m", "cpu", kind="classifier", num_labels=5)

def case(seed, n=12):
    "A score without ties, two models' qualities, prices."
    rng = np.random.default_rng(seed)
    return rng.permutation(n).astype(float), (rng.random(n) < .5).astype(float), rng.random(n), rng.random(n) + .1

# ---- deferral curves, against brute force

@pytest.mark.parametrize("seed", range(5))
def test_curve_and_area_are_those_of_every_cascade_tried(seed):
    score, small, large, price = case(seed)
    for cost in (None, price):
        x, y = deferral_curve(score, small, large, cost)
        paid = np.ones(len(score)) if cost is None else cost
        want_x, want_y = [], []
        for k in range(len(score) + 1):
            sent = score >= (np.sort(score)[::-1][k - 1] if k else np.inf)
            assert sent.sum() == k
            want_x.append(sum(p for p, s in zip(paid, sent) if s)/sum(paid))
            want_y.append(sum(l if s else m for m, l, s in zip(small, large, sent))/len(score))
        assert np.allclose(x, want_x) and np.allclose(y, want_y)
        fine = np.sort(np.append(np.linspace(0, 1, 20_001), x))   # a rule at every share between, by a coin for one row
        assert area(x, y) == pytest.approx(np.trapezoid(np.interp(fine, want_x, want_y), fine), abs=1e-9)

def test_no_order_beats_the_gains_and_all_orders_average_to_the_middle():
    _, small, large, _ = case(7, 6)
    every = [area(*deferral_curve(np.array(p, float), small, large)) for p in itertools.permutations(range(6))]
    assert area(*deferral_curve(large - small, small, large)) == pytest.approx(max(every))
    assert np.mean(every) == pytest.approx((small.mean() + large.mean())/2)

def test_equal_scores_go_by_place():
    x, y = deferral_curve(np.zeros(3), np.array([0., 0., 1.]), np.array([1., 0., 0.]))
    assert np.allclose(y, [1/3, 2/3, 2/3, 1/3])

# ---- scores of rules

@pytest.mark.parametrize("levels", [LEVELS, (0., .5, 1.), (.37,)])
def test_quantiles_are_numpys(levels):
    rng = np.random.default_rng(0)
    logs = [np.log(rng.random(n)) for n in (1, 2, 3, 7, 20)]
    assert np.allclose(quantiles(logs, levels), [np.quantile(l, levels, method="linear") for l in logs])

def test_summary_is_sum_mean_and_length():
    logs = [np.array([-1., -3.]), np.array([-.5])]
    assert np.allclose(summary(logs), [[-4, -2, 2], [-.5, -.5, 1]])
    assert np.allclose(with_tokens(logs), np.concatenate([summary(logs), quantiles(logs)], 1))

def test_a_learned_rule_finds_the_gain_and_is_the_same_each_time():
    rng = np.random.default_rng(0)
    features = rng.random((600, 3))
    gain = (features[:, 1] > .5)*1. - .5*(features[:, 2] > .7)
    rule = learned(features[:400], gain[:400])
    got = rule(features[400:])
    assert np.corrcoef(got, gain[400:])[0, 1] > .95
    assert (learned(features[:400], gain[:400])(features[400:]) == got).all()
    assert np.ptp(learned(features, np.zeros(600))(features)) == 0  # nothing gained: no row before another

# ---- what a token costs, counted by hand

def test_price_of_an_encoder_decoder_is_the_count_by_hand(t5):
    model, c = t5[0], t5[0].config
    def by_hand(layers):
        inner, square = c.num_heads*c.d_kv, c.d_model*c.num_heads*c.d_kv
        wide = (3 if c.is_gated_act else 2)*c.d_model*c.d_ff
        read = layers*(4*square + wide) + layers*2*square        # encoder; keys and values for the decoder
        wrote = layers*(4*square + 2*square + wide) + c.d_model*c.vocab_size
        return 2*read, 2*wrote                                   # a product and a sum for each weight
    assert price(model) == by_hand(3) and price(first_layers(model, 1)) == by_hand(1)

def test_price_of_a_classifier_is_the_count_by_hand(bert):
    c = bert[0].config
    layer = 2*(4*c.hidden_size**2 + 2*c.hidden_size*c.intermediate_size)
    assert price(bert[0]) == (4*layer, 0) and price(first_layers(bert[0], 2)) == (2*layer, 0)

# ---- cutting

def test_first_layers_run_as_the_whole_models_first_layers(t5, bert):
    from transformers import LlamaConfig, LlamaForCausalLM
    ids = torch.arange(5, 15)[None]
    model = t5[0]
    before = sum(p.numel() for p in model.parameters())
    cut = first_layers(model, 2)
    assert sum(p.numel() for p in model.parameters()) == before and model.config.num_layers == 3
    assert (cut.config.num_layers, cut.config.num_decoder_layers, len(cut.encoder.block),
        len(cut.decoder.block)) == (2, 2, 2, 2)
    with torch.no_grad():
        seen = model.encoder(ids, output_hidden_states=True).hidden_states[2]
        assert torch.allclose(cut.encoder.final_layer_norm(seen), cut.encoder(ids).last_hidden_state, atol=1e-5)
        small = first_layers(bert[0], 1)
        assert torch.allclose(small.bert(ids).last_hidden_state,
            bert[0].bert(ids, output_hidden_states=True).hidden_states[1], atol=1e-5)
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
                num_attention_heads=2)).eval()
        llama_cut = first_layers(llama, 1)
        assert len(llama_cut.model.layers) == llama_cut.config.num_hidden_layers == 1
        seen = llama(ids[:, :4], output_hidden_states=True).hidden_states[1]
        assert torch.allclose(llama_cut(ids[:, :4]).logits, llama.lm_head(llama.model.norm(seen)), atol=1e-5)

@pytest.mark.parametrize("keep", [0, -1, 3, 9])
def test_cuts_that_leave_nothing_or_cut_nothing_are_refused(t5, keep):
    with pytest.raises(KitError, match=f"keep={keep}") as e: first_layers(t5[0], keep)
    assert "\n" not in str(e.value)

def test_a_model_without_layers_is_refused():
    model = torch.nn.Linear(2, 2)
    model.config = None
    with pytest.raises(KitError, match="first_layers"): first_layers(model, 1)

# ---- rows and answers

def test_mix_has_all_tasks_in_one_order_for_each_seed():
    one, two = mix("intents,tracking", "test", 6, 1), mix("intents,tracking", "test", 6, 1)
    assert one == two != mix("intents,tracking", "test", 6, 2)
    assert [r["task"] for r in one].count("intents") == 6 == len(one)/2
    assert [r["task"] for r in one] != sorted(r["task"] for r in one)
    with pytest.raises(KitError, match="nothing_such"): mix("intents,nothing_such", "test", 2, 0)

def test_overlap_is_torchmetrics_f1_for_squad():
    squad = pytest.importorskip("torchmetrics.functional.text").squad  # which drops articles and dots: none here
    for said, right in [
            ("old dog slept", "old cat slept"),
            ("dog", "cat"),
            ("dog dog cat", "dog cat cat"),
            ("Dog", "dog"),
            ("big dog in town", "dog")]:
        peer = squad(dict(prediction_text=said, id="1"), dict(answers=dict(answer_start=[0], text=[right]), id="1"))
        assert overlap(said, right) == pytest.approx(peer["f1"].item()/100, abs=1e-6)
    assert overlap("", "dog") == 0 and overlap("", "") == 0

def test_scores_follow_the_metric_of_the_task():
    assert scored(dict(task="translation", label="the old dog slept ."), "the old cat slept .") == (0., .8)
    assert scored(dict(task="intents", label="call"), "call") == (1., 1.)
    assert scored(dict(task="svamp", label="( 3 + 4 )"), "( 4 + 3 )") == (1., 1.)     # equal in value
    assert scored(dict(task="svamp", label="( 3 + 4 )"), "( 4 - 3 )") == (0., 0.)

def test_answers_and_their_log_probabilities_are_those_of_full_passes(t5):
    model, tok = t5
    rows = mix("intents,tagging", "test", 4, 0)
    got = answered(model, tok, rows, most=6, size=3)
    assert min(got.wrote) < max(got.wrote)  # some end before their neighbours do
    for i, r in enumerate(rows):
        ids = torch.tensor([tok(r["input"])["input_ids"]])
        said = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, num_beams=1)
        with torch.no_grad(): logs = model(input_ids=ids, decoder_input_ids=said[:, :-1]).logits.log_softmax(-1)
        want = logs.gather(2, said[:, 1:, None])[0, :, 0]
        assert got.said[i] == tok.decode(said[0], skip_special_tokens=True).strip() and got.read[i] == ids.shape[1]
        assert len(got.logs[i]) == got.wrote[i] == len(want) and np.allclose(got.logs[i], want.numpy(), atol=1e-4)
        assert (got.exact[i], got.f1[i]) == scored(r, got.said[i])
    alone = answered(model, tok, rows, most=6, size=1)
    assert alone.said == got.said and all(np.allclose(a, b, atol=1e-4) for a, b in zip(alone.logs, got.logs))

def test_a_head_gives_logits_for_two_labels_and_for_more():
    rng = np.random.default_rng(0)
    for labels in (2, 3):
        y = np.arange(30) % labels
        x = rng.normal(size=(30, 8)) + 3*np.eye(8)[y]
        logits = few_shot_head(x, y)(x)
        assert logits.shape == (30, labels) and (logits.argmax(1) == y).mean() > .9
    two = few_shot_head(x[:20], np.arange(20) % 2)(x)
    assert np.allclose(two.sum(1), 0)  # their difference is what the head says

# ---- the notebook

@pytest.fixture(scope="module")
def tiny(tmp_path_factory, t5):
    "A random encoder-decoder of three layers with the zoo's tokenizer."
    from transformers import T5Config, T5ForConditionalGeneration
    place, tok = tmp_path_factory.mktemp("tiny"), t5[1]
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(vocab_size=len(tok), d_model=16, d_kv=8, d_ff=16, num_layers=3, num_heads=2,
            pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id,
            decoder_start_token_id=tok.pad_token_id)).save_pretrained(place)
    tok.save_pretrained(place)
    return str(place)

run = partial(ran, NB)

@pytest.mark.slow
def test_a_checkpoint_of_ones_own(tmp_path, torch_pool, tiny):
    found = run(tmp_path, torch_pool, profile="smoke", data="intents,tagging", model=tiny)
    assert set(found) == {"tokens-beat-sum-and-mean", "tokens-beat-both-where-words-count"}
    assert all(math.isfinite(v) for r in found.values() for v in r["arms"].values())
    assert found["tokens-beat-sum-and-mean"]["model"] == tiny

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and one
