"""Where each system's Python is, what environment it runs in, and how it is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = "PALATE_PEERS"
"""The environment variable that names the folder of the peers' environments; docs/bench.md says how to make it."""
THREADS = 2
COMMON: Mapping[str, str] = {
    "OMP_NUM_THREADS": str(THREADS),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "PYTHONUNBUFFERED": "1",
}
"""The same for everyone. Only one system computes at a time, so threads may wait for each other as they do alone."""


@dataclass(frozen=True)
class System:
    """A way to start a worker: its interpreter, its module, and what else is on its path."""

    name: str
    module: str
    python: Path
    path: tuple[Path, ...] = ()

    @property
    def there(self) -> bool:
        """Whether its environment is."""
        return self.python.exists() and all(folder.exists() for folder in self.path)

    @property
    def command(self) -> list[str]:
        """What is run, but for the row's file."""
        return [str(self.python), "-m", self.module]

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """The worker's variables, out of ours."""
        path = os.pathsep.join(str(folder) for folder in (*self.path, ROOT))
        return {**given, **COMMON, "PYTHONPATH": path}


OURS = System("palate", "bench.speed.ours", Path(sys.executable))


def peer(name: str, folder: Path | None) -> System | None:
    """The peer of a row; None where its environment was not made."""
    if folder is None:
        return None
    python, vllm = folder / "venv" / "bin" / "python", folder / "vllm" / "bin" / "python"
    found = {
        "trl-ppo": System("TRL 1.12", "bench.speed.trl_ppo", python, (folder / "trl112",)),
        "trl": System("TRL 1.16", "bench.speed.trl_trainers", python),
        "transformers": System("transformers", "bench.speed.transformers_generate", python),
        "vllm": System("vLLM", "bench.speed.vllm_generate", vllm),
    }[name]
    return found if found.there else None


def peers_folder() -> Path | None:
    """What `PALATE_PEERS` names, if anything."""
    named = os.environ.get(PEERS)
    return Path(named).expanduser().resolve() if named else None
