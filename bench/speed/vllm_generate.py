"""vLLM on the CPU as a worker: `python -m bench.speed.vllm_generate ROW.json` in vLLM's own environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from bench.speed.protocol import Link, serve
from bench.speed.workloads import Work

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")


def main(path: str) -> None:
    """Load, say so, answer."""
    link, work = Link(), Work.read(Path(path))
    import torch
    import vllm

    row = work.row
    engine = vllm.LLM(
        model=work.policy,
        dtype="float32",
        max_model_len=row.shape.positions,
        max_num_seqs=row.batch,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
    )
    new = row.answer[1]
    asked = vllm.SamplingParams(
        temperature=1.0, top_k=0, top_p=1.0, max_tokens=new, min_tokens=0, ignore_eos=True, detokenize=False
    )

    def turn(number: int) -> dict[str, Any]:
        prompts = [{"prompt_token_ids": work.data["prompts"][i]} for i in work.batch(number)]
        found = engine.generate(prompts, asked, use_tqdm=False)
        drawn = sum(len(one.outputs[0].token_ids) for one in found)
        if drawn != row.batch * new:
            raise SystemExit(f"{drawn} tokens were drawn instead of {row.batch * new}.")
        return {"counts": {"asked": sum(len(one["prompt_token_ids"]) for one in prompts), "drawn": drawn}}

    link.ready(vllm=vllm.__version__, torch=torch.__version__)
    serve(link, turn)


if __name__ == "__main__":
    main(sys.argv[1])
