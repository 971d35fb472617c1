"""J_r, the loss that repels a network from earlier optima, or attracts it to them (section 3)."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from imp_jax import masking
from imp_jax.masking import Mask, Params
from imp_jax.similarity import inner_product


def repulsion_loss(
    params: Params, mask: Mask, earlier_params_list: Sequence[Params], strength: float = 2.0
) -> Float[Array, ""]:
    """J_r(θ) = λ_r / |Θ| · Σ_{θ_r ∈ Θ} cos²(θ⊙m, θ_r⊙m), the plain form of section 3.

    Args:
      params: θ, the network in training.
      mask: m, the mask of its round, all True for what is never pruned: that counts too (ours).
      earlier_params_list: Θ, the optima of earlier rounds; empty in round 0, where J_r is 0.
      strength: λ_r, 2 repels and −1 attracts in the paper.

    Returns: a scalar. A network that is zero on the mask has no direction: its cosine counts as 0, and the
      gradient there is 0 and not nan.
    """
    if not earlier_params_list:
        return jnp.zeros(())
    params = masking.apply(params, mask)
    norm = inner_product(params, params)
    total = 0.0
    for earlier in earlier_params_list:
        earlier = masking.apply(earlier, mask)
        norms = norm * inner_product(earlier, earlier)
        # the inner `where` keeps 0/0 out of the gradient, the outer one out of the value
        cosine_squared = inner_product(params, earlier) ** 2 / jnp.where(norms > 0, norms, 1)
        total += jnp.where(norms > 0, cosine_squared, 0)
    return strength / len(earlier_params_list) * total
