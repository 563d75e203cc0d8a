"""Checkpoints: whole or not there, whatever happens to the process, the disk or the bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from palate.checkpoint import CheckpointStore
from palate.settings import PalateError


def _tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(7, 5, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "count": torch.tensor(step),
        "empty": torch.empty(0, 4),
    }


def _filled(folder: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(folder, keep=10, warn=lambda _: None)
    for step in steps:
        store.save(step, _tensors(step), {"step": step})
    return store


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = {
        "rate": 0.1 + 0.2,
        "tiny": 5e-324,
        "large": 2**63 + 1,
        "text": "día\n",
        "deep": {"list": [1, None, True]},
    }
    store = CheckpointStore(tmp_path)
    store.save(12, _tensors(12), state)
    found = store.newest()
    assert found is not None
    step, tensors, restored = found
    assert (step, restored) == (12, state)
    assert tensors.keys() == _tensors(12).keys()
    for name, tensor in _tensors(12).items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "never made").newest() is None


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    shared = torch.randn(64, 64)
    store = CheckpointStore(tmp_path)
    folder = store.save(1, {"embedding": shared, "head": shared, "row": shared[3], "turned": shared.T}, {})
    found = store.newest()
    assert found is not None
    tensors = found[1]
    assert tensors["head"].data_ptr() == tensors["embedding"].data_ptr()
    assert torch.equal(tensors["row"], shared[3])
    assert torch.equal(tensors["turned"], shared.T)
    assert (folder / "tensors-000.safetensors").stat().st_size < 2.5 * shared.nbytes


def test_an_integer_key_is_refused_before_it_changes_in_silence(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\.cursor: the key 3 is not a string"):
        CheckpointStore(tmp_path).save(1, {}, {"cursor": {3: "x"}})
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20, 30):
        store.save(step, _tensors(step), {})
    assert store.steps() == [30, 20]
    store.prune(0)
    assert store.steps() == [30]


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    folder = CheckpointStore(tmp_path).save(1, _tensors(1), {})
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert {p.name for p in folder.iterdir()} == {"MANIFEST.json", *manifest["files"]}


def test_any_flipped_bit_sends_the_reader_to_the_one_before(tmp_path: Path) -> None:
    store = _filled(tmp_path, 1)
    source = random.Random(0)
    heard: list[str] = []
    reader = CheckpointStore(tmp_path, warn=heard.append)
    for trial in range(60):
        newest = store.save(2, _tensors(2), {"step": 2})
        victim = source.choice(sorted(newest.iterdir()))
        content = bytearray(victim.read_bytes())
        content[source.randrange(len(content))] ^= 1 << source.randrange(8)
        victim.write_bytes(content)
        found = reader.newest()
        assert found is not None
        assert found[0] == 1, f"trial {trial}: a flipped bit in {victim.name} was not seen"
        assert torch.equal(found[1]["weight"], _tensors(1)["weight"])
    assert len(heard) == 60
    assert all("step-00000002 is skipped" in text for text in heard)


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "tensors-000.safetensors"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "empty"])
def test_a_torn_checkpoint_is_skipped(tmp_path: Path, name: str, fault: str) -> None:
    store = _filled(tmp_path, 1, 2)
    victim = tmp_path / "step-00000002" / name
    if fault == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1] if fault == "truncated" else b"")
    found = store.newest()
    assert found is not None
    assert found[0] == 1


def test_a_checkpoint_moved_to_another_step_is_not_believed(tmp_path: Path) -> None:
    store = _filled(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000009")
    assert store.newest() is None


def test_all_damaged_says_so(tmp_path: Path) -> None:
    _filled(tmp_path, 1)
    (tmp_path / "step-00000001" / "state.json").unlink()
    with pytest.warns(RuntimeWarning) as heard:
        assert CheckpointStore(tmp_path).newest() is None
    assert "none of the 1 checkpoints" in str(heard[-1].message)


def test_going_on_from_an_earlier_step_forgets_the_damaged_later_one(tmp_path: Path) -> None:
    store = _filled(tmp_path, 10, 20)
    (tmp_path / "step-00000020" / "state.json").unlink()
    store.save(15, _tensors(15), {})
    assert store.steps() == [15, 10]


def test_a_replaced_step_is_readable_while_it_is_replaced(tmp_path: Path) -> None:
    """Killed between the two renames of a replacement, the folder that stepped aside is what is found."""
    store = _filled(tmp_path, 5)
    (tmp_path / "step-00000005").rename(tmp_path / "step-00000005.before")
    found = store.newest()
    assert found is not None
    assert found[0] == 5
    store.save(5, _tensors(6), {"second": True})
    found = store.newest()
    assert found is not None
    assert found[2] == {"second": True}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def _run(program: str, *arguments: str) -> subprocess.Popen[str]:
    code = textwrap.dedent(program)
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


SAVES_FOREVER = """
    import sys, torch
    from pathlib import Path
    from palate.checkpoint import CheckpointStore
    store = CheckpointStore(Path(sys.argv[1]), keep=2)
    step = int(sys.argv[2])
    while True:
        step += 1
        store.save(step, {f"t{i}": torch.full((300, 300), float(step)) for i in range(4)}, {"step": step})
        print(step, flush=True)
"""


def test_killed_while_saving_the_newest_finished_checkpoint_is_found(tmp_path: Path) -> None:
    """kill -9 of a real process that does nothing but save, several times in the same folder."""
    reached = 0
    source = random.Random(7)
    for _ in range(4):
        process = _run(SAVES_FOREVER, str(tmp_path), str(reached))
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(3)][-1]
        time.sleep(source.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        said = max([said, *map(int, rest)])
        found = CheckpointStore(tmp_path, warn=pytest.fail).newest()
        assert found is not None
        reached, tensors, state = found
        assert reached >= said
        assert state["step"] == reached
        assert all(bool((t == float(reached)).all()) for t in tensors.values())


FILLS_THE_DISK = """
    import resource, sys, torch
    from pathlib import Path
    from palate.checkpoint import CheckpointStore
    from palate.settings import PalateError
    store = CheckpointStore(Path(sys.argv[1]))
    store.save(1, {"weight": torch.ones(10)}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        store.save(2, {"weight": torch.ones(100_000)}, {})
    except PalateError as fault:
        print(fault)
"""


def test_no_room_leaves_the_old_checkpoint_valid_and_says_so(tmp_path: Path) -> None:
    """The operating system refuses the bytes, as it does on a full disk."""
    process = _run(FILLS_THE_DISK, str(tmp_path))
    said, _ = process.communicate()
    assert "checkpoint of step 2 could not be written" in said
    assert "The checkpoint of step 1 is untouched. Make room and run the same command again." in said
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    found = CheckpointStore(tmp_path).newest()
    assert found is not None
    assert found[0] == 1


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(PalateError, match="checkpoint of step 1 could not be written"):
        CheckpointStore(tmp_path / "checkpoints").save(1, {}, {})
