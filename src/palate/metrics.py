"""What each number means: name, unit, meaning, what it is taken over, and where a healthy run keeps it.

One table for logs, documentation, report and diagnosis. The names are those that users of TRL and CleanRL
know; `verl_names` gives the same numbers the names that users of verl know.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass

_ANY = (-math.inf, math.inf)


@dataclass(frozen=True)
class Metric:
    """One metric. `over` says which cells are counted and how they are reduced; `healthy` is (low, high)."""

    name: str
    unit: str
    meaning: str
    over: str
    healthy: tuple[float, float] = _ANY

    def is_healthy(self, value: float) -> bool:
        """Whether a value lies where a healthy run keeps it; a value that is not finite never does."""
        return math.isfinite(value) and self.healthy[0] <= value <= self.healthy[1]


_ANSWERS = "mean over the answers of a rollout"
_TOKENS = "answer tokens (end token included, padding not); mean over the minibatch"
_VALUES = "cells with a value target; mean over the minibatch"
_ROLLOUT = "answer tokens of the whole rollout, before any step on it"
_TRAINED = "trained tokens (prompt and padding never); mean over the batch"
_PAIRS = "comparable pairs of the batch; ties of rank left out"
_GOOD = "chosen answers, or those with a thumb up; mean over the batch"
_BAD = "rejected answers, or those with a thumb down; mean over the batch"
_POSITIVE = (0.0, math.inf)
_SHARE = (0.0, 1.0)

_ONLINE = (
    Metric(
        "objective/kl",
        "nats",
        "Sum of log π − log π_ref over an answer: how far the policy has moved.",
        _ANSWERS,
        (-0.1, 50.0),
    ),
    Metric(
        "objective/entropy",
        "nats",
        "Sum of −log π over an answer: how surprising the sampled answers are.",
        _ANSWERS,
        _POSITIVE,
    ),
    Metric("objective/non_score_reward", "reward", "The KL penalty, −β · KL, as it enters the reward.", _ANSWERS),
    Metric("objective/rlhf_reward", "reward", "Score plus KL penalty: what the policy is trained to raise.", _ANSWERS),
    Metric("objective/scores", "reward", "Score after penalty for a missing end and clipping.", _ANSWERS),
    Metric(
        "objective/kl_coef", "reward per nat", "β, the price of a nat of KL.", "as used for this rollout", _POSITIVE
    ),
    Metric(
        "policy/approxkl_avg",
        "nats",
        "½ (log π_new − log π_old)²: how far the steps on one rollout went.",
        _TOKENS,
        (0.0, 0.1),
    ),
    Metric("policy/clipfrac_avg", "share", "Share of tokens whose ratio was clipped.", _TOKENS, (0.0, 0.3)),
    Metric(
        "policy/entropy_avg",
        "nats per token",
        "Entropy of the whole next-token distribution.",
        _TOKENS,
        (0.01, math.inf),
    ),
    Metric("loss/policy_avg", "1", "PPO's clipped surrogate, to be minimised.", _TOKENS),
    Metric(
        "loss/value_avg",
        "reward²",
        "½ clipped squared error of the value function, before its weight.",
        _VALUES,
        _POSITIVE,
    ),
    Metric("loss/entropy_avg", "nats", "−entropy of the next token, as a loss, before its weight.", _TOKENS),
    Metric(
        "loss/pretraining_avg",
        "nats",
        "−log p of the texts learnt beside the answers, before its weight.",
        "trained tokens of the step's texts; mean",
        _POSITIVE,
    ),
    Metric(
        "objective/score_scale",
        "reward",
        "Standard deviation that scores are divided by before training.",
        "answers so far, or of the first rollout",
        _POSITIVE,
    ),
    Metric("val/clipfrac_avg", "share", "Share of value predictions whose error was clipped.", _VALUES, (0.0, 0.5)),
    Metric("val/ratio", "1", "π_new / π_old; 1 when nothing has moved.", _TOKENS, (0.9, 1.1)),
    Metric("val/ratio_var", "1", "Mean of (π_new / π_old − 1)²: spread of the ratio about 1.", _TOKENS, (0.0, 0.1)),
    Metric("val/num_eos_tokens", "answers", "Answers that ended by themselves.", "count over the rollout", _POSITIVE),
    Metric(
        "val/error",
        "reward²",
        "Squared error of the value function before any step on the rollout.",
        "cells with a value target; mean over the rollout",
        _POSITIVE,
    ),
    Metric(
        "val/explained_variance",
        "share",
        "1 − error / variance of the returns: 1 is perfect, 0 a constant.",
        "cells with a value target, over the rollout",
        (0.0, 1.0),
    ),
    Metric("returns/mean", "reward", "Advantage plus value: what the value function learns.", _ROLLOUT),
    Metric("returns/var", "reward²", "Population variance of the returns.", _ROLLOUT, _POSITIVE),
    Metric("advantages/mean", "reward", "Advantage before whitening.", _ROLLOUT),
    Metric("advantages/var", "reward²", "Population variance of the advantage before whitening.", _ROLLOUT, _POSITIVE),
    Metric(
        "first_minibatch/ratio_error",
        "1",
        "|ratio − 1| in the first minibatch of a rollout; anything but rounding "
        "means that sampler and trainer disagree.",
        _TOKENS,
        (0.0, 1e-3),
    ),
    Metric(
        "sampling/sampling_logp_difference/mean",
        "nats",
        "|log p| by which sampler and trainer differ on the same tokens, on average; beyond rounding the run stops.",
        "tokens of up to 8 answers of a rollout; mean",
        (0.0, 1e-3),
    ),
    Metric(
        "sampling/sampling_logp_difference/max",
        "nats",
        "|log p| by which sampler and trainer differ on the same tokens, at most.",
        "tokens of up to 8 answers of a rollout; largest",
        (0.0, 1e-2),
    ),
    Metric(
        "sampling/importance_sampling_ratio/mean",
        "1",
        "π / sampler of the drawn tokens; 1 where the sampler is the policy.",
        _ROLLOUT,
        (0.9, 1.1),
    ),
    Metric(
        "sampling/importance_sampling_ratio/min", "1", "The smallest π / sampler of a drawn token.", _ROLLOUT, _POSITIVE
    ),
    Metric(
        "sampling/importance_sampling_ratio/max", "1", "The largest π / sampler of a drawn token.", _ROLLOUT, _POSITIVE
    ),
    Metric(
        "sampling/kl",
        "nats per token",
        "KL(sampler‖π) by the k3 estimate: how far the sampler is from the policy that is trained.",
        _ROLLOUT,
        (0.0, 1e-2),
    ),
    Metric(
        "sampling/groups_dropped",
        "share",
        "Groups drawn for this rollout that were dropped because their answers were all worth the same.",
        "groups of all rounds",
        _SHARE,
    ),
    Metric("sampling/rounds", "rounds", "Rounds of prompts drawn for this rollout.", "count", (1.0, math.inf)),
    Metric(
        "objective/greedy_scores",
        "reward",
        "Score of each prompt's likeliest answer, the baseline of the sampled ones.",
        "mean over the prompts of a rollout",
    ),
    Metric(
        "reward_std",
        "reward",
        "Population standard deviation of the scores of one prompt's answers.",
        _ANSWERS,
        _POSITIVE,
    ),
    Metric(
        "frac_reward_zero_std",
        "share",
        "Share of prompts whose answers all got the same score: nothing is learnt from them.",
        "prompts of a rollout",
        _SHARE,
    ),
    Metric(
        "clip_ratio/low_mean",
        "share",
        "Share of ratios clipped from below: a bad answer already unlikelier than 1 − ε.",
        "answer tokens, or answers where they are the action; mean over the minibatch",
        (0.0, 0.3),
    ),
    Metric(
        "clip_ratio/high_mean",
        "share",
        "Share of ratios clipped from above: a good answer already likelier than 1 + ε'.",
        "answer tokens, or answers where they are the action; mean over the minibatch",
        (0.0, 0.3),
    ),
    Metric("loss/kl_avg", "nats", "KL estimate as a loss, before its weight β.", _TOKENS),
    Metric(
        "objective/scores_margin",
        "reward",
        "Score of the answer that won minus that of the one that lost.",
        "pairs of a rollout; mean",
    ),
    Metric("duels/ties", "share", "Share of pairs whose answers got the same score.", "pairs of a rollout", _SHARE),
    Metric(
        "duels/identical",
        "share",
        "Share of pairs whose answers are the same text, so that nothing is learnt; near 1 the policy has collapsed.",
        "pairs of a rollout",
        (0.0, 0.5),
    ),
    Metric("kept/scores", "reward", "Score of the answers that were chosen to be imitated.", "those answers; mean"),
    Metric(
        "kept/share",
        "share",
        "Share of the answers that are imitated, copies left out.",
        "answers of a rollout; in its first passes",
        _SHARE,
    ),
    Metric(
        "kept/share_last",
        "share",
        "The same in the last passes over the rollout, when the bar is highest.",
        "answers of a rollout",
        _SHARE,
    ),
    Metric("response/length_mean", "tokens", "Answer length, end token included.", _ANSWERS, (1.0, math.inf)),
    Metric("response/eos_rate", "share", "Share of answers that ended by themselves.", _ANSWERS, (0.5, 1.0)),
    Metric("rewards/*/mean", "reward", "One reward source before weighting.", "answers it spoke of; mean"),
    Metric(
        "rewards/*/std",
        "reward",
        "Population standard deviation of one reward source.",
        "answers it spoke of",
        _POSITIVE,
    ),
    Metric("gold/mean", "reward", "The reward that is only watched, never trained on: a known truth.", _ANSWERS),
    Metric("episode", "answers", "Answers sampled so far.", "count since the stage began", _POSITIVE),
    Metric(
        "eps", "answers per second", "Answers learned from in a second of wall-clock time.", "one rollout", _POSITIVE
    ),
)

_OFFLINE = (
    Metric(
        "loss",
        "nats",
        "What is minimised: −log p of demonstrated tokens, or of the preferred order.",
        "the batch, in the unit its algorithm declares (tokens, rows or prompts)",
        _POSITIVE,
    ),
    Metric(
        "loss/center", "reward²", "Squared sum of a pair's rewards; keeps rewards near zero.", "rows; mean", _POSITIVE
    ),
    Metric("loss/language", "nats", "−log p of the answers' tokens, trained beside the ranking.", _TRAINED, _POSITIVE),
    Metric("loss/q", "reward²", "Σ over the Q heads of (Q(a) − r − γV')², per action.", _TRAINED, _POSITIVE),
    Metric("loss/v", "reward²", "Expectile error of the state's value against the slow Q heads.", _TRAINED, _POSITIVE),
    Metric("loss/cql", "nats", "Σ over the Q heads of −log softmax(Q)(a), before its weight.", _TRAINED, _POSITIVE),
    Metric("loss/awac", "nats", "Imitation, −e^(β·advantage) log π(a), before its weight.", _TRAINED, _POSITIVE),
    Metric("qvalues/mean", "reward", "What the slow Q heads say the taken action is worth (the lower one).", _TRAINED),
    Metric("qvalues/advantage", "reward", "The same minus the value of the state.", _TRAINED),
    Metric("values/mean", "reward", "Value of the state before an action.", _TRAINED),
    Metric("entropy", "nats per token", "Entropy of the whole next-token distribution.", _TRAINED, _POSITIVE),
    Metric("mean_token_accuracy", "share", "Share of tokens that were the most likely ones.", _TRAINED, _SHARE),
    Metric("num_tokens", "tokens", "Trained tokens so far.", "sum since the stage began", _POSITIVE),
    Metric(
        "accuracy",
        "share",
        "Share of pairs whose preferred answer got the higher reward; equal rewards are wrong.",
        _PAIRS,
        (0.5, 1.0),
    ),
    Metric("label_accuracy", "share", "Share of thumbs that the sign of the reward agrees with.", "rows; mean", _SHARE),
    Metric("margin", "reward", "Reward of the preferred answer minus that of the other.", _PAIRS, _POSITIVE),
    Metric("min_reward", "reward", "Lowest reward among a prompt's answers.", "rows; mean"),
    Metric("mean_reward", "reward", "Reward of the answers.", "answers of the batch; mean"),
    Metric("max_reward", "reward", "Highest reward among a prompt's answers.", "rows; mean"),
    Metric(
        "rewards/chosen", "nats", "β (log π − log π_ref) of preferred answers: how much likelier they became.", _GOOD
    ),
    Metric("rewards/rejected", "nats", "β (log π − log π_ref) of the other answers.", _BAD),
    Metric("logps/chosen", "nats", "log π of preferred answers, summed over tokens.", _GOOD),
    Metric("logps/rejected", "nats", "log π of the other answers, summed over tokens.", _BAD),
    Metric(
        "logps/chosen_change",
        "nats",
        "log π − log π_ref of chosen answers, summed over tokens: below 0 the policy unlearns what it is shown.",
        _GOOD,
        (-5.0, math.inf),
    ),
    Metric(
        "rewards/accuracies",
        "share",
        "Share of pairs whose chosen answer has the higher reward; equal is wrong. High in collapsed policies too.",
        "pairs; mean over the batch",
        _SHARE,
    ),
    Metric("rewards/margins", "nats", "Reward of the chosen answer minus that of the rejected one.", _GOOD),
    Metric("loss/sft", "nats", "−log π per token of the chosen answers, before its weight.", _GOOD, _POSITIVE),
    Metric("log_odds_chosen", "nats", "Log odds of the chosen answer minus those of the rejected one.", _GOOD),
    Metric("log_odds_ratio", "nats", "log σ of that difference: the odds-ratio term with its sign turned.", _GOOD),
    Metric(
        "kl",
        "nats",
        "The point from which answers count as gained or lost: KTO's estimate of KL(π‖π_ref), BCO's reward shift / β.",
        "the whole batch, before the step",
    ),
    Metric("epoch", "epochs", "Passes over the data so far.", "since the stage began", _POSITIVE),
)

_COMMON = (
    Metric(
        "steps_skipped",
        "steps",
        "Steps not taken because a loss, gradient, reward or log-probability was not finite; absent while none was.",
        "sum since the stage began",
        (0.0, 0.0),
    ),
    Metric("lr", "1", "Learning rate of the step.", "the step (mean over a rollout's steps)", _POSITIVE),
    Metric(
        "grad_norm",
        "1",
        "Global norm of the gradient before it is clipped.",
        "all trained parameters of the step (mean over a rollout's steps)",
        _POSITIVE,
    ),
    Metric("step_time", "seconds", "Wall-clock time of one iteration.", "one step or rollout", _POSITIVE),
    Metric(
        "tokens_per_second",
        "tokens per second",
        "Answer or trained tokens per second of wall-clock time.",
        "one step or rollout",
        _POSITIVE,
    ),
)

METRICS: Mapping[str, Metric] = {m.name: m for m in (*_ONLINE, *_OFFLINE, *_COMMON)}
"""Every metric by name; a `*` stands for the name of a reward."""


def lookup(name: str) -> Metric | None:
    """The metric behind a logged name: itself, a pattern it fits, or for `eval/NAME` that of NAME on held-out
    rows.
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, metric in METRICS.items():
        if "*" in pattern and fnmatch.fnmatchcase(name, pattern):
            return metric
    if name.startswith("eval/"):
        return lookup(name.removeprefix("eval/"))
    return None


_VERL: Mapping[str, str] = {
    "loss/policy_avg": "actor/pg_loss",
    "policy/clipfrac_avg": "actor/pg_clipfrac",
    "policy/approxkl_avg": "actor/ppo_kl",
    "policy/entropy_avg": "actor/entropy",
    "grad_norm": "actor/grad_norm",
    "lr": "actor/lr",
    "objective/scores": "critic/score/mean",
    "objective/rlhf_reward": "critic/rewards/mean",
    "advantages/mean": "critic/advantages/mean",
    "returns/mean": "critic/returns/mean",
    "loss/value_avg": "critic/vf_loss",
    "val/clipfrac_avg": "critic/vf_clipfrac",
    "val/explained_variance": "critic/vf_explained_var",
    "response/length_mean": "response_length/mean",
    "step_time": "timing_s/step",
    "tokens_per_second": "perf/throughput",
}


def verl_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same numbers under the names verl gives them; metrics verl has no name for are left out."""
    named = {_VERL[name]: value for name, value in metrics.items() if name in _VERL}
    if "response/eos_rate" in metrics:
        named["response_length/clip_ratio"] = 1.0 - metrics["response/eos_rate"]
    return named
