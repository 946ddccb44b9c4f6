"The shipped weights still do what their card says, and the recipe begins as it began."
import math
from slmkit.core.abilities import abilities
from slmkit.core.t5_1m import new_t5, start_of
from slmkit.toyland.tokenizer import build_tokenizer
from slmkit.core.zoo import load_model, zoo, zoo_folder

def test_the_card_is_reached():
    card = zoo()["t5-1m"]
    found = abilities(*load_model("t5-1m", device="cpu"), n=60, seed=1)
    for name, share in card["abilities"].items():
        off = 4*math.sqrt(max(share*(1 - share), .01)/60)
        assert abs(found[name] - share) <= off, f"{name}: {found[name]:.2f}, the card says {share:.2f}"

def test_the_card_knows_its_file():
    card = zoo()["t5-1m"]
    assert card["bytes"] == (zoo_folder()/"t5-1m/model.safetensors").stat().st_size
    assert card["parameters"] == sum(p.numel() for p in new_t5(build_tokenizer()).parameters())

def test_a_further_stage_begins_with_the_shipped_weights():
    shipped, _ = load_model("t5-1m", device="cpu")
    begun = start_of(2, build_tokenizer())
    assert all((p == q).all() for p, q in zip(shipped.parameters(), begun.parameters()))
