"The shipped weights still do what their cards say, and each recipe begins as it began."
import math
import pytest
from slmkit.recipes.probes import LONG, abilities
from slmkit.recipes.models import SHAPES, new_model, stage_start
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model, zoo, zoo_folder
from slmkit.toyland.tokenizer import build_tokenizer

QUICK = "lm-0.1m", "t5-1m"  # the other models take longer
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo()])
def test_the_card_is_reached(name):
    card = zoo()[name]
    many = 40 if card["parameters"] < 2e6 else 24
    found = abilities(*load_model(name, device="cpu", kind=card["kind"]), n=many, seed=1)
    assert set(found) == set(card["abilities"])
    for ability, share in card["abilities"].items():
        n = many//4 if ability in LONG else many
        off = 4*math.sqrt(max(share*(1 - share), .02)/n)
        assert abs(found[ability] - share) <= off, f"{ability}: {found[ability]:.2f}, the card says {share:.2f}"

@pytest.mark.parametrize("name", list(zoo()))
def test_the_card_knows_its_file(name):
    card = zoo()[name]
    kind = card.get("base", name).partition("-s")[0]
    assert card["bytes"] == (zoo_folder()/name/"model.safetensors").stat().st_size
    assert card["parameters"] == sum(p.numel() for p in new_model(kind, build_tokenizer()).parameters())
    assert card["tokens"] == card["history"][-1]["tokens"] > (1e6 if "base" in card else 1e7)

@pytest.mark.parametrize("name", [n for n, c in zoo().items() if "-s" not in n and "base" not in c])
def test_a_further_stage_begins_with_the_shipped_weights(name):
    shipped, _ = load_model(name, device="cpu", kind=zoo()[name]["kind"])
    begun = stage_start(name, 2, build_tokenizer())
    assert all((p == q).all() for p, q in zip(shipped.parameters(), begun.parameters()))

def test_equal_seeds_make_equal_weights_and_another_seed_another_base():
    tok = build_tokenizer()
    for name in SHAPES:
        one, two, other = (stage_start(name, 1, tok, s).state_dict() for s in (0, 0, 1))
        assert all((one[k] == two[k]).all() for k in one)
        assert any((one[k] != other[k]).any() for k in one)

def test_a_stage_or_model_that_is_none_is_one_line():
    with pytest.raises(KitError, match="no stage 7"): stage_start("t5-1m", 7, build_tokenizer())
    with pytest.raises(KitError, match="did you mean 'lm-1m'"): new_model("lm-1n", build_tokenizer())

@pytest.mark.parametrize("kind, wrong", [
    ("seq2seq", "lm-1m"),
    ("causal", "t5-1m"),
    ("masked", "lm-1m"),
    ("causal", "bert-1m")])
def test_a_model_of_another_kind_is_one_line(kind, wrong):
    with pytest.raises(KitError, match=f"is no {kind} model"): load_model(wrong, kind=kind)

def test_a_decoder_reads_512_tokens_and_an_encoder_has_a_head():
    lm, tok = load_model("lm-1m", device="cpu", kind="causal")
    ids = tok("ana has 3 apples . "*120, return_tensors="pt")["input_ids"][:, :512]
    assert ids.shape[1] == 512 and lm(ids).logits.shape == (1, 512, len(tok))
    head, _ = load_model("bert-1m", device="cpu", kind="classifier", num_labels=3)
    assert head.fresh and head(tok("ana has 3 apples .", return_tensors="pt")["input_ids"]).logits.shape == (1, 3)

SERIES = ["lm-0.1m", "lm-0.4m", "lm-1m", "lm-5m"]
def test_the_series_has_read_the_same_and_is_ordered_by_what_is_left_to_learn():
    cards = [zoo()[n] for n in SERIES]
    assert len({c["tokens"] for c in cards}) == 1 and len({c["history"][-1]["step"] for c in cards}) == 1
    losses, sizes = [c["loss"] for c in cards], [c["parameters"] for c in cards]
    assert losses == sorted(losses, reverse=True) and sizes == sorted(sizes)

def test_the_loss_of_a_card_is_that_of_its_weights():
    from functools import partial
    from slmkit.recipes.pretrain import held_out_loss, causal_batch
    model, tok = load_model("lm-0.4m", device="cpu", kind="causal")
    assert held_out_loss(model, partial(causal_batch, tokenizer=tok)) == pytest.approx(
        zoo()["lm-0.4m"]["loss"], abs=2e-3
    )

def test_all_weights_together_stay_small():
    assert sum(p.stat().st_size for p in zoo_folder().glob("*/model.safetensors")) < 36e6

def test_a_twin_does_as_it_is_told_and_its_base_does_not():
    from slmkit.recipes.probes import instruction_accuracy
    for name, card in zoo().items():
        if "base" not in card: continue
        twin, base = (instruction_accuracy(*load_model(n, device="cpu", kind="causal"), n=60, seed=1)
            for n in (name, card["base"]))
        assert twin["instructions, seen kinds"] > .6 > .1 >= base["instructions, seen kinds"]
