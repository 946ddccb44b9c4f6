"Schedules as transformers' own, branches that leave the trunk alone, growth that keeps the logits."

import math, random
import pytest
import torch
from slmkit.pretrain import learning_rate_schedules as s
from slmkit.toyland.grammar import kl, next_log_probs

@pytest.fixture(scope="module")
def language(): return s.language_named("small")

def test_wsd_is_transformers_schedule():
    from transformers import get_wsd_schedule
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.)
    peer = get_wsd_schedule(opt, num_warmup_steps=20, num_decay_steps=30, num_training_steps=100, decay_type="linear")
    assert max(abs(peer.lr_lambdas[0](i) - s.wsd(i, 70, 100, shape="linear")) for i in range(120)) < 1e-9

def test_cosine_is_transformers_schedule_down_to_a_tenth():
    from transformers import get_cosine_schedule_with_warmup
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.)
    peer = get_cosine_schedule_with_warmup(opt, num_warmup_steps=20, num_training_steps=100).lr_lambdas[0]
    assert max(abs(.1 + .9*peer(i) - s.cosine(i, 100)) for i in range(20, 101)) < 1e-9
    assert s.cosine(5, 100) == .25 and s.wsd(95, 90, 100) == pytest.approx(.1**.5)

def test_a_branch_leaves_the_trunk_as_it_was(language):
    words, data = len(language.words) + 1, s.stream(language, 0, 40)
    make = lambda: s.decoder(words, 8, 1, 0)
    two = s.trunk(make(), data, [20, 40], .01)
    one = s.trunk(make(), data, [40], .01)
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert same(two[40][1], one[40][1]) and same(two[40][2], one[40][2])  # the branch at 20 changed nothing
    assert not same(two[40][1], two[40][2])
    straight = make()  # a branch is the run that decays there
    s.run(straight, s.adam(straight), data, [.01*(s.wsd(i, math.inf, math.inf) if i < 36 else s.wsd(i + 1, 36, 40))
                                            for i in range(40)])
    assert same(straight, two[40][2])

@pytest.mark.parametrize("width, layers", [(16, 1), (8, 2), (24, 3)])
def test_growing_keeps_the_logits_and_goes_on_learning(language, width, layers):
    words, data = len(language.words) + 1, s.stream(language, 0, 10)
    small = s.decoder(words, 8, 1, 0)
    s.run(small, s.adam(small), data, [.01]*10)
    large, loud = s.grown(small, width, layers, 1), s.grown(small, width, layers, 1, silent=False)
    ids = data[0]["input_ids"]
    with torch.no_grad(): z, z_large, z_loud = (m.eval()(ids).logits for m in (small, large, loud))
    assert torch.allclose(z, z_large, atol=1e-5) and (z - z_loud).abs().max() > .01
    before = [p.clone() for p in large.parameters()]
    s.run(large, s.adam(large), data, [.01]*10)
    assert all((p != q).any() for p, q in zip(large.parameters(), before))

def test_excess_along_all_sentences_is_the_divergence(language):
    model = s.decoder(len(language.words) + 1, 8, 1, 0).eval()
    drawn = language.sample(random.Random(0), 4000)
    exact = kl(language, next_log_probs(language, model))
    assert s.excess(model, s.known(language, drawn)) == pytest.approx(exact, rel=.03)

def test_equal_updates_cost_the_same():
    small, large = s.equal_updates(300, .4, 1000, 8000)
    assert small*1000 + large*8000 == 300*8000
