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
from palate.losses.numeric import bounded as bounded
from palate.losses.numeric import cross_entropy as cross_entropy
from palate.losses.numeric import keep as keep
from palate.losses.numeric import row_entropy as row_entropy
from palate.losses.numeric import row_logp as row_logp
from palate.losses.numeric import token_logp as token_logp
from palate.losses.numeric import widen as widen
from palate.losses.policy import clipped_surrogate as clipped_surrogate
from palate.losses.policy import clipped_value_error as clipped_value_error
