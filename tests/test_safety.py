"""Files of strangers: nothing in them is run, unpacked or followed, and the refusal is one line. Exit code 2.

What a model folder may try is in models/test_load.py (pickles, code of its own) and models/test_tokenizer.py (chat
templates), what YAML may try in test_settings.py; here the same is asked of the command line.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from palate.data.source import Data, load
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.settings import PalateError

SECONDS = 60
ROW = b'{"prompt": "a", "completion": "b"}\n'
MODEL = "{architecture: llama, hidden_size: 32, layers: 1, heads: 2, vocabulary: 280, context: 32}"


def palate(here: Path, *words: str) -> str:
    """What the command says of a fault: one line on stderr, exit code 2, and no run left behind."""
    command = [sys.executable, "-m", "palate", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, timeout=SECONDS, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    *rest, last = done.stderr.strip().splitlines()
    assert not [line for line in rest if line.startswith("palate: ")]
    assert last.startswith("palate: ")
    return last.removeprefix("palate: ")


def _made_nothing(here: Path) -> bool:
    return not list(here.rglob("*.safetensors")) and not list(here.rglob("DONE"))


class Poison:
    """Pickled, this is a command: whoever unpickles it runs it."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self):
        return (os.system, (f"touch {self.ran}",))


def test_a_malicious_pickle_as_weights_names_the_flag_that_allows_pickle(tmp_path: Path) -> None:
    made = make(Make(hidden_size=32, layers=1, heads=2, vocabulary=280, context=32), ["a b"], 1)
    save(tmp_path / "model", made.trunk, made.tokenizer, Card("tiny", "nothing"))
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Poison(tmp_path / "ran")))
    (tmp_path / "data.jsonl").write_bytes(ROW * 8)
    words = ("sft", "model=model", "data=data.jsonl", "batch_size=4", "name=bad")
    said = palate(tmp_path, *words)
    assert "model: the weights are pickle files" in said
    assert "set allow_pickle: true" in said
    assert "model: the model cannot be loaded" in palate(tmp_path, *words, "allow_pickle=true")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["data.pkl", "data.pickle", "data.pt", "data.bin", "data.pkl.gz"])
def test_a_malicious_pickle_as_data_is_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Poison(tmp_path / "ran")))
    with pytest.raises(PalateError, match=rf"{name}: may hold pickled objects.*Convert it to jsonl or parquet"):
        load(Data(path=str(tmp_path / name)), 0)
    assert f"{name}: may hold pickled objects" in palate(tmp_path, "data", "check", name)
    assert not (tmp_path / "ran").exists()


def _tar(path: Path, mode: str) -> None:
    with tarfile.open(path, mode) as archive:
        for name in ("../escaped.jsonl", str(path.with_name("absolute.jsonl")), "rows.jsonl"):
            member = tarfile.TarInfo(name)
            member.size = len(ROW)
            archive.addfile(member, io.BytesIO(ROW))
        link = tarfile.TarInfo("link.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


def _zip(path: Path, _: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../escaped.jsonl", ROW)
        link = zipfile.ZipInfo("link.jsonl")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")


ARCHIVES = {"a.tar": (_tar, "w"), "a.tar.gz": (_tar, "w:gz"), "a.tgz": (_tar, "w:gz"), "a.zip": (_zip, "")}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_as_data_is_not_unpacked(tmp_path: Path, name: str) -> None:
    write, mode = ARCHIVES[name]
    here = tmp_path / "here"
    (here / "data").mkdir(parents=True)
    write(here / "data" / name, mode)
    said = palate(here, "sft", f"model={MODEL}", f"data=data/{name}", "batch_size=4", "name=bad")
    assert f"{name}: an archive. Unpack it and name the files inside." in said
    assert not (tmp_path / "escaped.jsonl").exists()
    assert not (here / "data" / "absolute.jsonl").exists()
    assert not list(here.rglob("link.jsonl"))
    with pytest.raises(PalateError, match="no data files found"):
        load(Data(path=str(here / "data")), 0)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB + "stages: *a8\n", "recipe.yaml:6: its aliases grow to more than 100,000 values. Mend it."),
        ("stages: &s [*s]\n", "recipe.yaml:1: an alias stands inside its own anchor. Mend it."),
        ("stages: " + "[" * 20_000, "recipe.yaml:1: not valid YAML: it nests too deeply. Mend it."),
        ("stages: " + "[" * 99 + "]" * 99, "recipe.yaml:1: it nests deeper than 64 levels. Mend it."),
    ],
    ids=["bomb", "loop", "brackets", "deep"],
)
def test_a_recipe_that_would_fill_the_memory_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert palate(tmp_path, "run", "recipe.yaml") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_an_override_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("stages: [{kind: train}]\n")
    for value in ("&a [*a]", "[" * 20_000, "{a: &a [1], b: &b [*a, *b]}"):
        assert palate(tmp_path, "run", "recipe.yaml", f"seed={value}").startswith("'seed=")


def test_code_in_yaml_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for spelled in (f"!!python/object/apply:os.system ['touch {ran}']", f"!!python/name:os.system touch {ran}"):
        (tmp_path / "recipe.yaml").write_text(f"stages: {spelled}\n")
        assert "recipe.yaml:1: not valid YAML: could not determine a constructor" in palate(
            tmp_path, "run", "recipe.yaml"
        )
    assert not ran.exists()


def test_links_that_form_a_loop_do_not_hang_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "rows.jsonl").write_bytes(ROW)
    for number in range(4):
        (folder / "deep" / f"loop{number}").symlink_to(folder)
    (folder / "itself.jsonl").symlink_to("itself.jsonl")
    (folder / "nowhere.jsonl").symlink_to("/nowhere/at/all")
    words = [sys.executable, "-m", "palate", "data", "check", "data", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=SECONDS, check=False)
    assert json.loads(done.stdout)["records"] == 1


def test_template_syntax_in_data_and_names_of_columns_is_text(tmp_path: Path) -> None:
    """What a row says fills a template once and is never a template itself."""
    said = "{{ 7 * 7 }} {a} {0.__class__} {% raw %} ${x}"
    (tmp_path / "data.jsonl").write_text(json.dumps({"q": said, "a": "{q}"}) + "\n")
    columns = {"prompt": "Q: {q}", "completion": "A: {a}"}
    (record,) = load(Data(path=str(tmp_path / "data.jsonl"), columns=columns), 0)
    assert (record.prompt, record.completion) == (f"Q: {said}", "A: {q}")


def test_an_error_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    """A column's name may hold what clears a screen or fakes a line; the error spells it out."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"\x1b[2J\npalate: all is well": 1}) + "\n")
    said = palate(tmp_path, "data", "check", "data.jsonl")
    assert "\x1b" not in said
    assert "\\x1b[2J\\npalate: all is well" in said
    assert _made_nothing(tmp_path)
