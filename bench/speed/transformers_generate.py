"""transformers' `generate` as a worker: `python -m bench.speed.transformers_generate ROW.json`, peers' environment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from bench.speed import gpu
from bench.speed.protocol import Link, serve
from bench.speed.workloads import PAD, Work


def main(path: str) -> None:
    """Load, say so, answer."""
    link, work = Link(), Work.read(Path(path))
    torch.set_num_threads(2)
    gpu.watch(link, work.row)
    dtype, device = getattr(torch, work.row.precision), work.row.device
    model = AutoModelForCausalLM.from_pretrained(work.policy, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None
    new = work.row.answer[1]
    asked = GenerationConfig(
        max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=PAD
    )

    @torch.no_grad()
    def turn(number: int) -> dict[str, Any]:
        prompts_BT = torch.tensor([work.data["prompts"][i] for i in work.batch(number)], device=device)
        mask_BT = torch.ones_like(prompts_BT)
        found_BT = model.generate(input_ids=prompts_BT, attention_mask=mask_BT, generation_config=asked)
        drawn = found_BT.numel() - prompts_BT.numel()
        if drawn != len(prompts_BT) * new:
            raise SystemExit(f"{drawn} tokens were drawn instead of {len(prompts_BT) * new}.")
        return {"counts": {"asked": prompts_BT.numel(), "drawn": drawn}}

    link.ready(transformers=transformers.__version__, torch=torch.__version__)
    serve(link, turn)


if __name__ == "__main__":
    main(sys.argv[1])
