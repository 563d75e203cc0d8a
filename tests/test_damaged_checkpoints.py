"""Five hundred damaged checkpoints: every one is seen, and the one before is what a run goes on from."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from palate.checkpoint import CheckpointStore, sha256

COUNT = 500


def _tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tensors = {f"weight.{i}": torch.randn(6, 5, generator=generator) for i in range(4)}
    return {**tensors, "tied": tensors["weight.0"], "count": torch.tensor(step)}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointStore:
    """Two whole checkpoints of several tensors files each."""
    monkeypatch.setattr("palate.checkpoint._SHARD_BYTES", 250)
    store = CheckpointStore(tmp_path / "checkpoints", warn=lambda _: None)
    for step in (1, 2):
        store.save(step, _tensors(step), {"step": step, "memory": {"kl_coef": 0.1 * step}})
    return store


def _pick(folder: Path, dice: random.Random, pattern: str = "*") -> Path:
    return dice.choice(sorted(folder.glob(pattern)))


def _said(folder: Path) -> dict:
    return json.loads((folder / "MANIFEST.json").read_text())


def _say(folder: Path, manifest: object) -> None:
    """A manifest spelled just as a save spells it."""
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _facts(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def flipped_bit(folder: Path, dice: random.Random) -> None:
    victim = _pick(folder, dice)
    content = bytearray(victim.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    victim.write_bytes(content)


def truncated(folder: Path, dice: random.Random) -> None:
    victim = _pick(folder, dice)
    content = victim.read_bytes()
    victim.write_bytes(content[: dice.randrange(len(content))])


def lengthened(folder: Path, dice: random.Random) -> None:
    with _pick(folder, dice).open("ab") as file:
        file.write(dice.randbytes(dice.randrange(1, 40)))


def overwritten(folder: Path, dice: random.Random) -> None:
    victim = _pick(folder, dice)
    victim.write_bytes(dice.randbytes(victim.stat().st_size))


def deleted(folder: Path, dice: random.Random) -> None:
    _pick(folder, dice).unlink()


def renamed(folder: Path, dice: random.Random) -> None:
    victim = _pick(folder, dice)
    victim.rename(folder / f"{victim.stem}-copy{victim.suffix}")


def swapped(folder: Path, dice: random.Random) -> None:
    one, other = dice.sample(sorted(folder.iterdir()), 2)
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def duplicated(folder: Path, dice: random.Random) -> None:
    shutil.copy(_pick(folder, dice), folder / "tensors-007.safetensors")


def of_the_other_step(folder: Path, dice: random.Random) -> None:
    victim = _pick(folder, dice)
    victim.write_bytes((folder.with_name("step-00000001") / victim.name).read_bytes())


def the_whole_other_step(folder: Path, dice: random.Random) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000001"), folder)


def link_to_the_same_bytes(folder: Path, dice: random.Random) -> None:
    victim = _pick(folder, dice)
    away = folder.parent / "elsewhere"
    shutil.copy(victim, away)
    victim.unlink()
    victim.symlink_to(away)


def folder_of_the_same_name(folder: Path, dice: random.Random) -> None:
    victim = _pick(folder, dice)
    victim.unlink()
    victim.mkdir()


def linked_folder(folder: Path, dice: random.Random) -> None:
    away = folder.parent / "elsewhere"
    folder.rename(away)
    folder.symlink_to(away)


def something_more(folder: Path, dice: random.Random) -> None:
    name = dice.choice(["state.json.orig", "optimizer.pt", "tensors-999.safetensors", ".hidden"])
    (folder / name).write_bytes(dice.randbytes(dice.randrange(20)))


def manifest_without_a_file(folder: Path, dice: random.Random) -> None:
    """The file is gone and its entry too: what is left agrees with itself."""
    manifest, victim = _said(folder), _pick(folder, dice, "tensors-*")
    del manifest["files"][victim.name]
    victim.unlink()
    _say(folder, manifest)


def manifest_that_forgot_a_file(folder: Path, dice: random.Random) -> None:
    manifest = _said(folder)
    del manifest["files"][_pick(folder, dice, "[ts]*").name]
    _say(folder, manifest)


def manifest_that_fits_other_tensors(folder: Path, dice: random.Random) -> None:
    """Tensors of another step, or damaged ones, under a manifest that was made to fit them."""
    manifest, victim = _said(folder), _pick(folder, dice, "tensors-*")
    if dice.random() < 0.5:
        victim.write_bytes((folder.with_name("step-00000001") / victim.name).read_bytes())
    else:
        victim.write_bytes(victim.read_bytes()[:-4] + dice.randbytes(4))
    manifest["files"][victim.name] = _facts(victim)
    _say(folder, manifest)


def manifest_that_fits_more_tensors(folder: Path, dice: random.Random) -> None:
    manifest, more = _said(folder), folder / "tensors-009.safetensors"
    shutil.copy(_pick(folder, dice, "tensors-*"), more)
    manifest["files"][more.name] = _facts(more)
    _say(folder, manifest)


def name_that_leads_away(folder: Path, dice: random.Random) -> None:
    """A path out of the folder, to a file that exists and has the size and digest that are said of it."""
    away = folder.parent / "tensors-000.safetensors"
    shutil.copy(folder / "tensors-000.safetensors", away)
    manifest = _said(folder)
    name = dice.choice([f"../{away.name}", str(away), "./state.json", "..", ".", "a/../state.json", "..\\x", "\x00"])
    manifest["files"][name] = _facts(away)
    if dice.random() < 0.5 and not name.startswith("."):
        manifest["files"].pop(away.name)
    _say(folder, manifest)


def manifest_of_another_spelling(folder: Path, dice: random.Random) -> None:
    manifest = _said(folder)
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=dice.choice([None, 2, 4])))


def manifest_of_nonsense(folder: Path, dice: random.Random) -> None:
    name = _pick(folder, dice, "tensors-*").name
    facts = dice.choice([None, 1, "x", [], {}, {"bytes": "12", "sha256": None}, {"bytes": 10**400, "sha256": "0"}])
    files = dice.choice([{name: facts}, [], None, 3, {"state.json": facts}, {}])
    _say(folder, dice.choice([{"format": "palate-checkpoint-2", "files": files}, files, {"format": files}]))


def manifest_without_a_bottom(folder: Path, dice: random.Random) -> None:
    depth = dice.randrange(1000, 200_000)
    (folder / "MANIFEST.json").write_text("[" * depth + "]" * dice.choice([0, depth]))


Damage = Callable[[Path, random.Random], None]
DAMAGES: tuple[Damage, ...] = (
    *[flipped_bit] * 6,
    *[truncated] * 3,
    lengthened,
    overwritten,
    deleted,
    renamed,
    swapped,
    duplicated,
    of_the_other_step,
    the_whole_other_step,
    link_to_the_same_bytes,
    folder_of_the_same_name,
    linked_folder,
    something_more,
    manifest_without_a_file,
    manifest_that_forgot_a_file,
    *[manifest_that_fits_other_tensors] * 2,
    manifest_that_fits_more_tensors,
    *[name_that_leads_away] * 2,
    manifest_of_another_spelling,
    manifest_of_nonsense,
    manifest_without_a_bottom,
)


def test_every_damage_is_seen_and_the_checkpoint_before_is_used(store: CheckpointStore, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(store.folder, whole)
    heard: list[str] = []
    reader = CheckpointStore(store.folder, warn=heard.append)
    met: Counter[str] = Counter()
    for trial in range(COUNT):
        dice = random.Random(trial)
        damage = DAMAGES[trial % len(DAMAGES)]
        shutil.rmtree(store.folder)
        shutil.copytree(whole, store.folder)
        damage(store.folder / "step-00000002", dice)
        found = reader.newest()
        assert found is not None, f"trial {trial}: {damage.__name__}"
        step, tensors, state = found
        assert step == 1, f"trial {trial}: {damage.__name__} was not seen"
        assert state == {"step": 1, "memory": {"kl_coef": 0.1}}
        assert tensors.keys() == _tensors(1).keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in _tensors(1).items())
        assert len(heard) == trial + 1
        assert "step-00000002 is skipped" in heard[-1]
        met[damage.__name__] += 1
    print(f"{COUNT} damaged checkpoints, all seen: {dict(met)}")


def test_a_step_that_was_asked_for_is_given_or_nothing(store: CheckpointStore) -> None:
    for step in (1, 2):
        found = store.newest(step)
        assert found is not None
        assert found[0] == step
    assert store.newest(3) is None
    (store.folder / "step-00000002" / "state.json").unlink()
    assert store.newest(2) is None
    found = store.newest()
    assert found is not None
    assert found[0] == 1


def test_a_damaged_checkpoint_gives_way_to_the_next_save(store: CheckpointStore) -> None:
    """Whatever stands in its place, a link included, and nothing outside the folder is touched."""
    away = store.folder.parent / "away"
    shutil.copytree(store.folder / "step-00000002", away)
    shutil.rmtree(store.folder / "step-00000002")
    (store.folder / "step-00000002").symlink_to(away)
    store.save(2, _tensors(7), {})
    found = store.newest()
    assert found is not None
    assert torch.equal(found[1]["weight.0"], _tensors(7)["weight.0"])
    assert sorted(p.name for p in store.folder.iterdir()) == ["step-00000001", "step-00000002"]
    assert (away / "MANIFEST.json").exists()


def test_a_removal_that_was_killed_leaves_nothing_torn_in_sight(store: CheckpointStore) -> None:
    """As a kill in the middle of it would: the folder already has its hidden name, half of its files are gone."""
    hidden = store.folder / ".removed-step-00000001"
    (store.folder / "step-00000001").rename(hidden)
    (hidden / "state.json").unlink()
    heard: list[str] = []
    reader = CheckpointStore(store.folder, warn=heard.append)
    assert reader.steps() == [2]
    assert reader.newest() is not None
    assert heard == []
    store.save(3, _tensors(3), {})
    assert sorted(p.name for p in store.folder.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_removal_hides_the_folder_before_it_takes_a_file(store: CheckpointStore) -> None:
    """A file that cannot be removed (its folder is read-only) is told about; no torn checkpoint is left in sight."""
    heard: list[str] = []
    pruner = CheckpointStore(store.folder, warn=heard.append)
    locked = store.folder / "step-00000001"
    (locked / "kept").mkdir()
    (locked / "kept" / "file").touch()
    (locked / "kept").chmod(0o500)
    pruner.prune(1)
    left = store.folder / ".removed-step-00000001" / "kept"
    if left.exists():  # a superuser removes it all the same
        left.chmod(0o700)
        assert "could not be removed" in heard[0]
    assert pruner.steps() == [2]
