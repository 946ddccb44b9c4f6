"Hinton's distillation loss against the loss written out, autograd and TRL; its rivals; the small language."
import math, os
import pytest, torch
import torch.nn.functional as F
from slmkit.core.fit import collate, lm_loss
from slmkit.core.settings import KitError
from slmkit.distill.soft_targets import (decoder, distance, distillation_loss, language_named, logits_and_labels,
    mean_entropy, permuted, sentence_rows, smoothing_for, soft_loss, trained)

def draw(n=9, k=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, v = (torch.randn(n, k, generator=g, dtype=torch.float64)*2 for _ in range(2))
    return z, v, torch.randint(k, (n,), generator=g)

@pytest.mark.parametrize("T", [.5, 1., 4.])
@pytest.mark.parametrize("alpha", [0., .3, 1.])
def test_the_loss_is_the_formula(T, alpha):
    z, v, y = draw()
    p, q = ((x/T).exp()/(x/T).exp().sum(-1, keepdim=True) for x in (v, z))
    hard = -(z.exp()/z.exp().sum(-1, keepdim=True))[torch.arange(9), y].log().mean()
    want = alpha*T*T*(p*(p/q).log()).sum(-1).mean() + (1 - alpha)*hard
    assert torch.allclose(distillation_loss(z, v, y, T, alpha), want)

def test_its_gradient_goes_to_the_difference_of_centred_logits():
    z, v, y = draw()
    centred = lambda x: x - x.mean(-1, keepdim=True)
    z.requires_grad_()
    distillation_loss(z, v, y, T=1e3).backward()
    assert torch.allclose(z.grad*9*7, centred(z.detach()) - centred(v), rtol=1e-2, atol=2e-2)

def test_no_temperature_is_refused():
    with pytest.raises(KitError, match="temperature 0"): distillation_loss(*draw(), T=0)

def test_equals_trl_times_the_square():
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    z, v, y = draw()
    for T in (1., 2., 5.):
        theirs = trainer.GKDTrainer.generalized_jsd_loss(z[None], v[None], y[None], beta=0, temperature=T)
        assert torch.allclose(T*T*theirs, distillation_loss(z, v, y, T))

def test_permuted_keeps_the_numbers_and_the_right_word():
    p, y = draw(200)[0].softmax(-1), draw(200)[2]
    torch.manual_seed(0)
    mixed = permuted(p, y)
    at = torch.arange(200), y
    assert torch.equal(mixed[at], p[at]) and torch.equal(mixed.sort(-1).values, p.sort(-1).values)
    moved = (mixed != p).sum(-1)
    assert (moved > 0).float().mean() > .9

@pytest.mark.parametrize("entropy", [.2, 1., 2.5])
def test_smoothing_has_the_entropy_asked_for(entropy):
    e = smoothing_for(entropy, 21)
    p = torch.full((21,), e/21, dtype=torch.float64)
    p[0] += 1 - e
    assert math.isclose(float(torch.special.entr(p).sum()), entropy, rel_tol=1e-4)

def test_padding_counts_in_no_loss():
    language = language_named("small")
    rows = sentence_rows(language, sorted(language.table, key=len)[:1] + sorted(language.table, key=len)[-1:])
    model = decoder(language, 8, 0)
    apart = torch.cat([logits_and_labels(model, collate([r], 0))[0] for r in rows])
    together, labels = logits_and_labels(model, collate(rows, 0))
    assert torch.allclose(apart, together, atol=1e-5) and len(labels) == sum(len(r["labels"]) - 1 for r in rows)
    batch = collate(rows, 0)
    assert torch.allclose(F.cross_entropy(together, labels), lm_loss(model, batch), rtol=1e-5)

def test_a_student_learns_from_its_teacher_alone_and_the_teacher_stays():
    language = language_named("small")
    rows = sentence_rows(language, list(language.table)[:64])
    teacher = trained(language, rows, lm_loss, 12, 1, 40)
    before = [p.clone() for p in teacher.parameters()]
    student = trained(language, rows, soft_loss(teacher, T=2.), 8, 0, 40)
    assert distance(language, student) < distance(language, decoder(language, 8, 0))
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters()))
    assert 0 < mean_entropy(teacher, collate(rows, 0)) < math.log(20)

def test_an_unknown_language_is_refused():
    with pytest.raises(KitError, match="grammar or small"): language_named("english")
