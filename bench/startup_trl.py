"""One SFT step by TRL, for bench/startup.py: run by the Python of its own environment, with a folder to work in."""

from __future__ import annotations

import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Make a model as small as palate's, train one step, and leave the file `stepped`."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Mark(TrainerCallback):
        def on_step_end(self, *args: object, **more: object) -> None:
            (folder / "stepped").write_text("1", encoding="utf-8")

    words = {word: i for i, word in enumerate(("<pad>", "<bos>", "<eos>", *map(str, range(397))))}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=128, n_embd=64, n_layer=2, n_head=4))
    ids = [[3 + (i * 7 + t) % 397 for t in range(48)] for i in range(64)]
    how = SFTConfig(
        output_dir=str(folder / "out"),
        max_steps=1,
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    data = Dataset.from_dict({"input_ids": ids})
    SFTTrainer(model, args=how, train_dataset=data, processing_class=tokenizer, callbacks=[Mark()]).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
