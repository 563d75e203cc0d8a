"""PPO from human (or any) feedback with nothing hidden: one file, plain torch, one answer at a time, no padding.

Read it beside `docs/concepts.md`. It does what `palate ppo` does with its default settings, and
`tests/docs/test_by_hand.py` checks that both give the same numbers. The dice are borrowed from
`palate.randomness`, so that both throw the same; everything else is spelled out below.

    python docs/by_hand.py MODEL_FOLDER
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from palate.randomness import key, permutation, uniforms
from palate.records import fingerprint


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run; names and defaults are those of `palate ppo`."""

    iterations: int = 3
    answers: int = 8  # rollout_batch_size
    epochs: int = 4  # num_ppo_epochs
    minibatches: int = 2  # num_mini_batches
    longest: int = 12  # sampling.max_new_tokens
    temperature: float = 1.0
    beta: float = 0.05  # kl_coef
    clip: float = 0.2  # cliprange and cliprange_value
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    rate: float = 1e-3  # learning rate, falling linearly to 0
    seed: int = 1


class Critic(nn.Module):
    """A copy of the policy's body with a head of one number, zero at the start (detail 28)."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.body = copy.deepcopy(policy.base_model)
        self.head = nn.Linear(policy.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens_T: Tensor, start: int) -> Tensor:
        """The value of the state before each answer token: read one place earlier (the shift)."""
        hidden_TD = self.body(tokens_T[None]).last_hidden_state[0]
        return self.head(hidden_TD)[start - 1 : -1, 0]


def answer_logp(model: nn.Module, tokens_T: Tensor, start: int, temperature: float) -> Tensor:
    """log p of each answer token given all before it: logits of the place before, divided by the temperature."""
    logits_TV = model(tokens_T[None]).logits[0, start - 1 : -1] / temperature
    return logits_TV.log_softmax(-1).gather(-1, tokens_T[start:, None])[:, 0]


@torch.no_grad()
def sample(model: nn.Module, prompt: list[int], die: int, end: int, recipe: Recipe) -> Tensor:
    """One answer by inverse-CDF sampling; the t-th token uses the t-th throw of this answer's own die."""
    tokens = list(prompt)
    for t in range(recipe.longest):
        logits_V = model(torch.tensor([tokens])).logits[0, -1] / recipe.temperature
        cdf_V = logits_V.log_softmax(-1).double().exp().cumsum(0)
        throw = uniforms(np.array([die], dtype=np.uint64), t)[0] * float(cdf_V[-1])
        tokens.append(int(torch.searchsorted(cdf_V, torch.tensor(throw, dtype=torch.float64), right=True)))
        if tokens[-1] == end:
            break
    return torch.tensor(tokens)


@dataclass
class Episode:
    """One answer and what is worked out about it before learning."""

    tokens_T: Tensor
    start: int  # where the answer begins
    score: float
    old_logp: Tensor
    kl: Tensor  # log p − log p_ref of each answer token
    old_value: Tensor
    advantage: Tensor
    returns: Tensor


def judge(episode_tokens: Tensor, start: int, score: float, nets: tuple[nn.Module, nn.Module, Critic], r: Recipe):
    """KL-penalised reward, generalised advantage, return; the score lands on the last token (details 33 and 36)."""
    policy, reference, critic = nets
    with torch.no_grad():
        old_logp = answer_logp(policy, episode_tokens, start, r.temperature)
        kl = old_logp - answer_logp(reference, episode_tokens, start, r.temperature)
        value = critic(episode_tokens, start)
    reward = -r.beta * kl
    reward[-1] += score
    advantage, running = torch.zeros_like(reward), 0.0
    for t in reversed(range(len(reward))):
        next_value = value[t + 1] if t + 1 < len(reward) else 0.0
        running = reward[t] + r.gamma * next_value - value[t] + r.gamma * r.lam * running
        advantage[t] = running
    return Episode(episode_tokens, start, score, old_logp, kl, value, advantage, advantage + value)


def whiten(episodes: list[Episode]) -> None:
    """Advantages of all answers' tokens together: mean 0, variance 1 (population), 1e-8 inside the root."""
    pooled = torch.cat([e.advantage for e in episodes])
    scale = (pooled.var(correction=0) + 1e-8).rsqrt()
    for e in episodes:
        e.advantage = (e.advantage - pooled.mean()) * scale


def minibatch_loss(episodes: list[Episode], policy: nn.Module, critic: Critic, r: Recipe) -> Tensor:
    """Clipped surrogate plus vf_coef × clipped value error, averaged over the minibatch's answer tokens."""
    total, tokens = torch.zeros(()), sum(len(e.old_logp) for e in episodes)
    for e in episodes:
        ratio = (answer_logp(policy, e.tokens_T, e.start, r.temperature) - e.old_logp).exp()
        surrogate = torch.maximum(-e.advantage * ratio, -e.advantage * ratio.clamp(1 - r.clip, 1 + r.clip))
        value = critic(e.tokens_T, e.start)
        near = value.clamp(e.old_value - r.clip, e.old_value + r.clip)
        error = 0.5 * torch.maximum((value - e.returns) ** 2, (near - e.returns) ** 2)
        total = total + (surrogate + r.vf_coef * error).sum()
    return total / tokens


def train(
    folder: str, prompts: list[str], reward: Callable[[str, str], float], r: Recipe
) -> tuple[nn.Module, list[dict[str, float]]]:
    """The whole of PPO. Returns the trained policy and one row of numbers per iteration."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # eval: no dropout (detail 14)
    reference = copy.deepcopy(policy).requires_grad_(False)
    critic = Critic(policy)
    adam = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], eps=1e-5, weight_decay=0.0)
    per_epoch, history = len(prompts) // r.answers, []
    for number in range(1, r.iterations + 1):
        epoch, place = divmod(number - 1, per_epoch)
        order = permutation(len(prompts), r.seed, "ppo", "order", epoch)
        episodes = []
        for i in order[place * r.answers : (place + 1) * r.answers]:
            prompt = tokenizer.encode(prompts[i], add_special_tokens=False)
            die = key(r.seed, "ppo", number, fingerprint(prompt), 0, "sample")
            tokens_T = sample(policy, prompt, die, tokenizer.eos_token_id, r)
            text = tokenizer.decode(tokens_T[len(prompt) :], skip_special_tokens=True)
            score = reward(prompts[i], text)
            episodes.append(judge(tokens_T, len(prompt), score, (policy, reference, critic), r))
        whiten(episodes)
        losses = []
        for ppo_epoch in range(r.epochs):
            shuffled = permutation(len(episodes), r.seed, "ppo", number, ppo_epoch, "minibatches")
            for part in torch.tensor(shuffled).chunk(r.minibatches):
                loss = minibatch_loss([episodes[i] for i in part], policy, critic, r)
                adam.zero_grad()
                loss.backward()
                adam.param_groups[0]["lr"] = r.rate * (1 - (number - 1) / r.iterations)
                adam.step()
                losses.append(loss.item())
        score = float(np.mean([e.score for e in episodes]))
        kl = float(np.mean([e.kl.sum().item() for e in episodes]))
        history.append({"objective/scores": score, "objective/kl": kl, "loss": losses[-1]})
        print(f"iteration {number}: score {score:.4f}  kl {kl:.4f}  loss {losses[0]:+.4f} → {losses[-1]:+.4f}")
    return policy, history


if __name__ == "__main__":
    questions = [f"Say something about number {n}:" for n in range(16)]
    train(sys.argv[1], questions, lambda prompt, answer: answer.count("e") / 10.0, Recipe())
