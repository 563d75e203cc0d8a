"""The exact moments at which `bench.chaos` ends a run, in the order in which one run of bench/chaos.yaml meets them.

Each is met by the restart after the one before it, so that a single run goes through all of them.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from bench.moments import Both, Call, Moment, OnDisk

STEP, DECODING = "palate.step:Stepper.step", "palate.models.decode:Slots.step"
SAMPLES = "palate.workspace:Workspace.sample"
SFT, REWARD, RLHF = "1-sft/.started", "2-reward/.started", "3-rlhf/.started"


@dataclass(frozen=True)
class Link:
    """A moment, whether the newest checkpoint is damaged after it, and what must then be in the run directory."""

    moment: Moment
    damage: bool = False
    leaves: str = "run.yaml"
    """A pattern of paths."""


CHAIN: Sequence[Link] = (
    Link(OnDisk("the settings are half written", "os.rename", r"/\.provenance\.json\.new$")),
    Link(OnDisk("the first stage has a folder and nothing in it", "open", r"/1-sft/\.stage\.yaml\.new$")),
    Link(OnDisk("sft: before it says what it began", "os.rename", r"/1-sft/\.\.started\.new$")),
    Link(Call("sft: SIGTERM before the first step", "palate.stages._rows:read", once=SFT, signal=signal.SIGTERM)),
    Link(Call("sft: before the first checkpoint", STEP, 2, after=True, once=SFT)),
    Link(Call("sft: a checkpoint's folder is staged, and empty", "palate.checkpoint:save_file", once=SFT)),
    Link(Call("sft: a checkpoint's tensors are written", "palate.checkpoint:save_file", after=True, once=SFT)),
    Link(OnDisk("sft: a checkpoint lacks its manifest", "open", r"/1-sft/checkpoints/.*MANIFEST\.json$")),
    Link(OnDisk("sft: a checkpoint is whole but not in place", "os.rename", r"/1-sft/checkpoints/\.staged")),
    Link(Call("sft: the first epoch ends", STEP, 6, after=True, once=SFT)),
    Link(Call("sft: the second epoch begins", STEP, 4, once=SFT)),
    Link(Call("sft: SIGTERM", STEP, 2, once=SFT, signal=signal.SIGTERM), leaves="1-sft/checkpoints/step-0000000[78]"),
    Link(
        Call("sft: SIGTERM in the last step", STEP, 4, once=SFT, signal=signal.SIGTERM),
        leaves="1-sft/checkpoints/step-00000012",
    ),
    Link(OnDisk("sft: the model is written but not in place", "os.rename", r"/1-sft/\.model\.partial$")),
    Link(OnDisk("sft: the model is in place, the stage not done", "os.rename", r"/1-sft/\.DONE\.new$")),
    Link(Call("sft: done, before anything else", "palate.run:_run_stage", 2, once=SFT)),
    Link(Call("reward: normalising before the first step", DECODING, 3, once=REWARD)),
    Link(Call("reward: a checkpoint before older ones go", "palate.checkpoint:CheckpointStore.prune", 2, once=REWARD)),
    Link(OnDisk("reward: an old checkpoint is half removed", "os.remove", r"(state|MANIFEST)\.json$", 2, once=REWARD)),
    Link(Call("reward: a damaged checkpoint follows", STEP, 2, once=REWARD), damage=True),
    Link(
        Call("reward: SIGTERM in the last step", STEP, 3, once=REWARD, signal=signal.SIGTERM),
        leaves="2-reward/checkpoints/step-00000006",
    ),
    Link(
        OnDisk(
            "reward: its checkpoints are half removed", "os.remove", r"(state|MANIFEST)\.json$", once="2-reward/DONE"
        )
    ),
    Link(OnDisk("rlhf: before it says what it began", "os.rename", r"/3-rlhf/\.\.started\.new$")),
    Link(Call("rlhf: in the middle of decoding, no checkpoint yet", DECODING, 5, once=RLHF)),
    Link(Call("rlhf: between two minibatches, no checkpoint yet", STEP, 1, after=True, once=RLHF)),
    Link(Call("rlhf: between two minibatches", STEP, 11, after=True, once=RLHF)),
    Link(Call("rlhf: in the middle of decoding", DECODING, 20, once=RLHF)),
    Link(Call("rlhf: metrics are written, samples are not", "palate.workspace:Workspace.log", after=True, once=RLHF)),
    Link(Call("rlhf: samples are written, tokens are not", SAMPLES, after=True, once=RLHF)),
    Link(Call("rlhf: all is written but the checkpoint", "palate.workspace:Workspace.tokens", after=True, once=RLHF)),
    Link(Call("rlhf: SIGTERM while decoding", DECODING, 18, once=RLHF, signal=signal.SIGTERM)),
    Link(
        Call("rlhf: SIGINT between minibatches", STEP, 3, once=RLHF, signal=signal.SIGINT),
        leaves="3-rlhf/checkpoints/step-*",
    ),
    Link(
        Both(
            "rlhf: SIGTERM between minibatches, then killed in the last save",
            Call("asked", STEP, 3, once=RLHF, signal=signal.SIGTERM),
            OnDisk("killed", "os.rename", r"/3-rlhf/checkpoints/\.staged"),
        )
    ),
    Link(
        Call("rlhf: a damaged checkpoint follows", "palate.checkpoint:CheckpointStore.prune", after=True, once=RLHF),
        True,
    ),
    Link(OnDisk("rlhf: between the two renames of a step saved again", "os.rename", r"/3-rlhf/checkpoints/\.staged")),
    Link(
        Call("rlhf: SIGINT behind the last rollout", SAMPLES, 3, once=RLHF, signal=signal.SIGINT),
        leaves="3-rlhf/checkpoints/step-00000010",
    ),
    Link(OnDisk("rlhf: the model is in place, the stage not done", "os.rename", r"/3-rlhf/\.DONE\.new$")),
    Link(OnDisk("rlhf: between the two renames of a model saved again", "os.rename", r"/3-rlhf/\.model\.partial$")),
    Link(OnDisk("the report is half written", "os.rename", r"/\.report\.md\.new$")),
)


MOVES = "os.rename"
"""Making room for other settings, and finding a stage again under another number, are renames."""
CHANGED: Sequence[Link] = (
    Link(OnDisk("other settings: before the old work moves aside", MOVES, "/1-sft$")),
    Link(Call("other settings: the old work is aside", "palate.stage_folder:StageFolder.start", once="replaced")),
    Link(Call("other settings: at work", STEP, 5, once=SFT)),
)
CHANGED_BACK: Sequence[Link] = (
    Link(OnDisk("first settings: before the others move aside", MOVES, "/1-sft$")),
    Link(OnDisk("first settings: nothing is in place", MOVES, "/replaced/1-sft-")),
    Link(Call("first settings: back in place", "palate.stage_folder:StageFolder.is_done")),
)
RENUMBERED: Sequence[Link] = (
    Link(OnDisk("another order: before the stage moves", MOVES, "/3-rlhf$")),
    Link(Call("another order: the stage has moved", "palate.stage_folder:StageFolder.adopt", 4, after=True)),
)
NUMBERED_BACK: Sequence[Link] = (Link(OnDisk("first order: before the stage moves", MOVES, "/4-rlhf$")),)
