"""Objectives: per token, per row or per pair; pure functions of tensors, nothing is averaged unless said.

Shapes: B rows, T tokens, K answers of one prompt, V vocabulary. Every function computes in float32 at least: float16
and bfloat16 inputs are widened first, float64 stays float64. What a mask leaves out may hold anything, nan and infinity
included: it is replaced *before* any arithmetic, so neither a value nor a gradient can see it. Formulas without a mask
of their own (`clipped_surrogate`, `bradley_terry`, …) speak of each element alone; their callers blank the inputs with
`keep` and add up the result. −log σ is `-logsigmoid`, exact to the last bit in both tails, which `softplus` is not:
beyond its threshold of 20 it drops a term of 2e-9.
"""

from palate.losses.comparison import best_of as best_of
from palate.losses.comparison import bradley_terry as bradley_terry
from palate.losses.comparison import centring as centring
from palate.losses.comparison import comparison_error as comparison_error
from palate.losses.comparison import ranking as ranking
from palate.losses.comparison import rating_error as rating_error
from palate.losses.comparison import soft_bradley_terry as soft_bradley_terry
from palate.losses.numeric import answer_logp as answer_logp
from palate.losses.numeric import bounded as bounded
from palate.losses.numeric import cross_entropy as cross_entropy
from palate.losses.numeric import keep as keep
from palate.losses.numeric import log1mexp as log1mexp
from palate.losses.numeric import row_entropy as row_entropy
from palate.losses.numeric import row_logp as row_logp
from palate.losses.numeric import token_logp as token_logp
from palate.losses.numeric import widen as widen
from palate.losses.offline import Heads as Heads
from palate.losses.offline import expectile_error as expectile_error
from palate.losses.offline import ilql as ilql
from palate.losses.offline import ilql_logits as ilql_logits
from palate.losses.offline import ilql_taken as ilql_taken
from palate.losses.offline import next_value as next_value
from palate.losses.policy import added_mix as added_mix
from palate.losses.policy import cispo as cispo
from palate.losses.policy import clipped_surrogate as clipped_surrogate
from palate.losses.policy import clipped_value_error as clipped_value_error
from palate.losses.policy import convex_mix as convex_mix
from palate.losses.policy import sequence_log_ratio as sequence_log_ratio
from palate.losses.preference import Divergence as Divergence
from palate.losses.preference import aot as aot
from palate.losses.preference import aot_unpaired as aot_unpaired
from palate.losses.preference import apo_down as apo_down
from palate.losses.preference import apo_zero as apo_zero
from palate.losses.preference import bco_pair as bco_pair
from palate.losses.preference import cpo as cpo
from palate.losses.preference import ddpo_score as ddpo_score
from palate.losses.preference import discopop as discopop
from palate.losses.preference import dpo as dpo
from palate.losses.preference import dpop as dpop
from palate.losses.preference import exo_pair as exo_pair
from palate.losses.preference import f_dpo as f_dpo
from palate.losses.preference import hinge as hinge
from palate.losses.preference import implicit_reward as implicit_reward
from palate.losses.preference import ipo as ipo
from palate.losses.preference import ld_logp as ld_logp
from palate.losses.preference import log_odds as log_odds
from palate.losses.preference import nca_pair as nca_pair
from palate.losses.preference import orpo as orpo
from palate.losses.preference import robust_dpo as robust_dpo
from palate.losses.preference import simpo as simpo
from palate.losses.preference import slic as slic
from palate.losses.preference import soft_dpo as soft_dpo
from palate.losses.preference import sppo_hard as sppo_hard
from palate.losses.preference import wpo_weight as wpo_weight
from palate.losses.unpaired import bco as bco
from palate.losses.unpaired import kto as kto
from palate.losses.unpaired import kto_kl as kto_kl
