"""The obvious routed experts: every expert on every token, then a choice."""

import jax
import jax.numpy as jnp


def routed_swiglu(
  x_TD: jax.Array,
  expert_TK: jax.Array,
  weight_TK: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
) -> jax.Array:
  """See ops.routed_swiglu; costs E / K times the needed work."""
  x_TD, weight_TK, gate_EDF, up_EDF, down_EFD = (
    a.astype(jnp.float32) for a in (x_TD, weight_TK, gate_EDF, up_EDF, down_EFD)
  )
  hidden_ETF = jax.nn.silu(jnp.einsum('TD,EDF->ETF', x_TD, gate_EDF))
  hidden_ETF *= jnp.einsum('TD,EDF->ETF', x_TD, up_EDF)
  out_ETD = jnp.einsum('ETF,EFD->ETD', hidden_ETF, down_EFD)
  one_hot_TKE = jax.nn.one_hot(expert_TK, gate_EDF.shape[0])
  return jnp.einsum('TKE,TK,ETD->TD', one_hot_TKE, weight_TK, out_ETD)
