"""What makes each recipe fit a laptop: overrides and nothing else, as one would type them after the file's name.

    palate run recipes/presets/tldr.yaml stages.sft.model=MODEL stages.sft.data.path=posts.jsonl …

`{gpt2}`, `{gpt_neox}` and `{qwen2}` stand for folders of small models, `{data}` for a folder of small files.
"""

from __future__ import annotations

_LITTLE_PPO = (
    "stages.rlhf.total_episodes=16",
    "stages.rlhf.rollout_batch_size=8",
    "stages.rlhf.microbatch_size=4",
    "stages.rlhf.algorithm.rollout_forward_batch_size=4",
)

_BOTH_OF_2019 = (
    "stages.reward.model={gpt2}",
    "stages.reward.data.path={data}/labels.json",
    "stages.reward.batch_size=4",
    "stages.reward.microbatch_size=2",
    "stages.reward.normalise.model={gpt2}",
    "stages.reward.normalise.rows=8",
    "stages.reward.normalise.sampling.max_new_tokens=10",  # of all stages: they share &sampling
    "stages.reward.encoding.query_length=24",  # of all stages: they share &queries
    "stages.rlhf.model={gpt2}",
    "stages.rlhf.truncation.after=2",
    *_LITTLE_PPO,
    "stages.evaluate.models.before={gpt2}",
    "stages.evaluate.prompts.path={data}/labels.json",
    "stages.evaluate.prompts.rows=4",
    "stages.evaluate.truncation.after=2",
)

_BOOKS = (
    *_BOTH_OF_2019,
    "stages.reward.normalise.data.path={data}/passages.jsonl",
    "stages.rlhf.prompts.path={data}/passages.jsonl",
)

_POSTS = (
    "stages.sft.data.path={data}/posts.jsonl",
    "stages.sft.batch_size=8",
    "stages.sft.microbatch_size=4",
    "stages.reward.data.path={data}/comparisons.jsonl",
    "stages.reward.batch_size=8",
    "stages.reward.microbatch_size=4",
    "stages.reward.normalise.data.path={data}/posts.jsonl",
    "stages.reward.normalise.rows=8",
    "stages.rlhf.prompts.path={data}/posts.jsonl",
    "stages.rlhf.sampling.max_new_tokens=8",
    "stages.rlhf.encoding.max_prompt_length=60",
    *_LITTLE_PPO,
    "stages.evaluate.prompts.path={data}/posts.jsonl",
    "stages.evaluate.prompts.rows=4",
    "stages.evaluate.comparisons.path={data}/comparisons.jsonl",
    "stages.evaluate.comparisons.rows=4",
    "stages.evaluate.sampling.max_new_tokens=8",
    "stages.evaluate.encoding.max_prompt_length=60",
)

_SUMMARIES = (
    *(line.replace("posts.jsonl", "summaries.jsonl") for line in _POSTS),
    "stages.sft.layout.lora_rank=2",
    "stages.reward.layout.lora_rank=2",
    "stages.rlhf.layout.lora_rank=2",
)

_WORLD = (
    "stages.sft.model.hidden_size=16",
    "stages.sft.model.layers=1",
    "stages.sft.model.heads=2",
    "stages.sft.model.intermediate_size=32",
    "stages.sft.data.rows=120",
    "stages.reward.data.rows=40",
    "stages.reward.normalise.rows=8",
    "stages.ppo.prompts.rows=40",
    "stages.ppo.sampling.max_new_tokens=8",
    "stages.ppo.total_episodes=16",
    "stages.ppo.rollout_batch_size=8",
    "stages.ppo.microbatch_size=4",
    "stages.evaluate.prompts.rows=4",
    "stages.evaluate.comparisons.rows=10",
    "stages.evaluate.sampling.max_new_tokens=8",
)

SHRUNK: dict[str, tuple[str, ...]] = {
    "tasting_room": _WORLD,
    "reward_hacking": _WORLD,
    "presets/lm_human_preferences_sentiment": _BOOKS,
    "presets/lm_human_preferences_descriptiveness": _BOOKS,
    "presets/lm_human_preferences_cnndm": (
        *_BOTH_OF_2019,
        "stages.reward.normalise.data.path={data}/articles.jsonl",
        "stages.rlhf.prompts.path={data}/articles.jsonl",
    ),
    "presets/lm_human_preferences_tldr": _BOOKS,
    "presets/tldr": ("stages.sft.model={gpt_neox}", *_POSTS),
    "tldr_pythia": ("stages.sft.model={gpt_neox}", *_SUMMARIES),
    "sentiment_gpt2": (
        "stages.sft.model={gpt2}",
        "stages.sft.data={path: {data}/reviews.jsonl, format: text, held_out: 0.2}",
        "stages.sft.batch_size=8",
        "stages.sft.microbatch_size=4",
        "stages.reward.model={gpt2}",
        "stages.reward.data.path={data}/reviews.jsonl",
        "stages.reward.data.held_out=0.3",
        "stages.reward.batch_size=4",
        "stages.reward.microbatch_size=4",
        "stages.reward.encoding.query_length=6",
        "stages.reward.normalise.data.path={data}/reviews.jsonl",
        "stages.reward.normalise.rows=8",
        "stages.reward.normalise.sampling.max_new_tokens=8",
        "stages.rlhf.prompts.path={data}/reviews.jsonl",
        "stages.rlhf.prompts.held_out=0.2",
        "stages.rlhf.encoding.query_length=6",
        "stages.rlhf.sampling.max_new_tokens=8",
        *_LITTLE_PPO,
        "stages.evaluate.prompts.path={data}/reviews.jsonl",
        "stages.evaluate.prompts.rows=4",
        "stages.evaluate.encoding.query_length=6",
        "stages.evaluate.sampling.max_new_tokens=8",
    ),
    "helpful_harmless": (
        "stages.reward.model={qwen2}",
        "stages.reward.data.path={data}/transcripts.jsonl",
        "stages.reward.layout.lora_rank=2",
        "stages.reward.batch_size=8",
        "stages.reward.microbatch_size=4",
        "stages.reward.normalise.rows=8",
        "stages.reward.normalise.sampling.max_new_tokens=8",
        "stages.rlhf.model={qwen2}",
        "stages.rlhf.prompts.path={data}/transcripts.jsonl",
        "stages.rlhf.layout.lora_rank=2",
        "stages.rlhf.sampling.max_new_tokens=8",
        *_LITTLE_PPO,
        "stages.evaluate.models.start={qwen2}",
        "stages.evaluate.prompts.path={data}/transcripts.jsonl",
        "stages.evaluate.prompts.rows=4",
        "stages.evaluate.comparisons.path={data}/transcripts.jsonl",
        "stages.evaluate.comparisons.rows=4",
        "stages.evaluate.sampling.max_new_tokens=8",
    ),
}
"""Recipe, by its path below recipes/, to its overrides."""
