"""Make the inputs of recipes/stories.yaml out of the folder of real data: once, in seconds, into build/stories/.

    python recipes/stories/prepare.py [DATA_FOLDER [OUT_FOLDER]]

DATA_FOLDER is $PALATE_DATA when left out, and ../shared/data when that is not set either. Written are `stories260K/`,
the converted model, and the Rotten Tomatoes sentences of either split, `tomatoes_train.jsonl` and
`tomatoes_val.jsonl`: the reward model never sees the second.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import convert

SPLITS = ("train", "val")


def tomatoes(source: Path, out: Path) -> dict[str, int]:
    """The labelled sentences, one file for each split; how many went where."""
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    counts: dict[str, int] = {}
    for split in SPLITS:
        kept = [json.dumps({"text": r["text"], "label": r["label"]}) for r in rows if r["split"] == split]
        (out / f"tomatoes_{split}.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
        counts[split] = len(kept)
    return counts


def main(data: Path, out: Path) -> None:
    """Everything into `out`, which is made where it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    convert.main(data / "models" / "stories260K", out / "stories260K")
    print("Rotten Tomatoes:", tomatoes(data / "sentiment" / "rotten_tomatoes.jsonl.gz", out))


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    default = Path(os.environ.get("PALATE_DATA", "../shared/data"))
    main(*(given + [default, Path("build/stories")][len(given) :]))
