"""Knowledge editing: the rank-one formula against constrained least squares, edits side by side against edited weights,
places and scores against brute force."""
import random
import pytest
import torch
from slmkit.adapt.knowledge_editing import (added, answers, encoded, facts_of, find_values, fine_tuned, held,
                                            in_context,
    memory, projection, questions, rank_one, rank_one_edits, read_targets, recalled, recognised, second_moment, shown,
    studied, subject_keys, wanted_of)
from slmkit.core.fit import fresh_copy
from slmkit.core.settings import KitError
from slmkit.core.trunk import Trunk
from slmkit.core.zoo import load_model

def small():
    model, tok = load_model("lm-1m", kind="causal")
    return model.requires_grad_(False).eval(), tok

def facts(n=3):
    names = "ana ben cara dan emma finn".split()
    return [dict(prompt=f"the town of {p} is", subject=p, target_new="oslo", rephrase_prompt=f"{p} lives in",
                 locality_prompt=f"the pet of {q} is", locality_ground_truth="cat")
            for p, q in zip(names[:n], names[::-1])]

def test_rank_one_is_the_least_change_of_ordinary_keys():
    "min |(W' - W) C^(1/2)| with W'k = v, solved as a quadratic programme by its Lagrangian."
    torch.manual_seed(0)
    for _ in range(20):
        W, X, k, v = (torch.randn(*s, dtype=torch.float64) for s in ((3, 5), (40, 5), (5,), (3,)))
        C = X.T @ X/40
        system = torch.cat([torch.cat([2*C, k[:, None]], 1), torch.cat([k, k.new_zeros(1)])[None]])
        best = torch.stack([torch.linalg.solve(system, torch.cat([k.new_zeros(5), r[None]]))[:5] for r in v - W @ k])
        u, w = rank_one(W, C, k, v)
        assert torch.allclose(torch.outer(u, w), best)
        assert torch.allclose((W + torch.outer(u, w)) @ k, v)

def test_the_same_value_leaves_the_weight():
    W, k = torch.randn(3, 5), torch.randn(5)
    u, _ = rank_one(W, torch.eye(5), k, W @ k)
    assert u.abs().max() < 1e-5

def test_edits_side_by_side_are_edits_of_the_weight():
    model, tok = small()
    rows, module = facts(), projection(model, 2)
    asked = questions(tok, rows)
    C = second_moment(model, tok, module, ["ana lives in oslo . ben has a cat ."]*4, 40)
    k, v0 = subject_keys(model, tok, module, rows)
    v = find_values(model, module, asked["prompt"], v0, 3)
    with Trunk(model, 2): together = answers(model, asked, module, rank_one_edits(module, C, k, v))
    for i, row in enumerate(rows):
        edited = fresh_copy(model, 0).eval()
        projection(edited, 2).weight.data += torch.outer(*rank_one(module.weight, C, k[i], v[i]))
        alone = answers(edited, questions(tok, [row]))
        assert all(torch.equal(together[q][i], alone[q][0]) for q in alone)

def test_the_value_is_what_the_key_gets_and_lowers_the_loss():
    model, tok = small()
    rows, module = facts(), projection(model, 2)
    batch = questions(tok, rows)["prompt"]
    C = second_moment(model, tok, module, ["ana lives in oslo ."]*9, 40)
    k, v0 = subject_keys(model, tok, module, rows, prefixes=("",))
    assert torch.allclose(k @ module.weight.T, v0, atol=1e-4)
    v = find_values(model, module, batch, v0, 8)
    assert ((v - v0).norm(dim=1) <= 4.001*v0.norm(dim=1)).all()
    with torch.no_grad():
        before = read_targets(model, batch)[0]
        with added(module, rank_one_edits(module, C, k, v)): after = read_targets(model, batch)[0]
    assert (after < before - 1).all()

def test_fine_tuning_is_adam_on_a_copy_and_its_bound_holds():
    model, tok = small()
    rows = facts()
    D = fine_tuned(model, projection(model, 3), questions(tok, rows)["prompt"], 4, 1e-3)
    for i, row in enumerate(rows):
        copy = fresh_copy(model, 0).eval()
        weight = projection(copy, 3).weight.requires_grad_(True)
        opt = torch.optim.Adam([weight], lr=1e-3)
        for _ in range(4):
            opt.zero_grad()
            read_targets(copy, questions(tok, [row])["prompt"])[0].sum().backward()
            opt.step()
        assert torch.allclose(weight.detach(), projection(model, 3).weight + D[i], atol=2e-4)
    bound = fine_tuned(model, projection(model, 3), questions(tok, rows)["prompt"], 4, 1e-3, most=5e-4)
    assert bound.abs().max() <= 5e-4 < D.abs().max()

def test_places_and_losses():
    model, tok = small()
    batch = encoded(tok, ["ana has a cat . the town of ana is", "dan is"], ["oslo", "a boss"], ["ana", "dan"])
    words = [tok.convert_ids_to_tokens(row)[at] for row, at in zip(batch["input_ids"], batch["at"][:, 0])]
    assert [w.strip("▁") for w in words] == ["ana", "dan"] and batch["at"][0] > 4  # the last one named
    nll, said, wanted = read_targets(model, batch)
    for i in range(2):
        one = {k: v[i:i + 1] for k, v in batch.items() if k != "at"}
        assert torch.isclose(model(**one).loss, nll[i], atol=1e-4) and len(said[i]) == len(wanted[i])

def test_scores():
    rng = random.Random(0)
    draw = lambda: {q: [torch.tensor([rng.randrange(2) for _ in range(2)]) for _ in range(20)] for q in
                    ("prompt", "rephrase", "locality")}
    for _ in range(20):
        said, wanted = draw(), draw()
        marks, right = held(said, wanted), lambda q, i: said[q][i].tolist() == wanted[q][i].tolist()
        for i in range(20):
            assert marks["efficacy"][i] == right("prompt", i) and marks["locality"][i] == right("locality", i)
            assert marks["all"][i] == all(right(q, i) for q in said)
    model, tok = small()
    asked = questions(tok, facts())
    assert all(held(answers(model, asked), wanted_of(model, asked))["locality"])
    told = in_context(facts())[0]
    assert told["locality_prompt"] == "the town of ana is oslo. the pet of finn is"

def test_memory():
    seen, foils = torch.tensor([-1., -4.]), torch.tensor([-2., -4.])
    assert recognised(seen, foils) == (1 + 1 + 0 + .5)/4
    model, tok = load_model("lm-1m", kind="causal")
    texts, new = studied("sentences", 12, 0), studied("sentences", 12, 1)
    assert not {*texts} & {*new} and sorted(texts[3].split()) == sorted(studied("shuffled", 12, 0)[3].split())
    before = memory(model, tok, texts, new)
    after = memory(shown(fresh_copy(model, 0), tok, texts, 6, .001), tok, texts, new)
    assert after[0] > before[0] and after[1] > before[1] + .2
    assert recalled(model, tok, texts) == before[1]

def test_another_kind_of_model_is_refused_in_one_line():
    with pytest.raises(KitError): projection(load_model("bert-1m", kind="masked")[0], 0)
    assert len(facts_of("made up", "val", 3, 4)) == 4
