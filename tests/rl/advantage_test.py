"""Group advantages against known values and their own rules."""

import hypothesis
import jax
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r1jax.rl import advantage
from tests import known_answers

_group = jax.jit(advantage.group_advantage)
_centred = jax.jit(advantage.centred_advantage)
_num_equal = jax.jit(advantage.num_zero_variance)


def test_known_advantages_use_the_population_std():
  known = known_answers.load('grpo_adv')
  reward_PG = np.float32([known['rewards']])
  np.testing.assert_allclose(_group(reward_PG)[0], known['adv_pop'], atol=1e-6)
  np.testing.assert_allclose(
    _centred(reward_PG)[0], known['adv_drgrpo'], atol=1e-6
  )


# 0.1 and 1.1 have means that rounding moves; 3 has none.
def test_equal_rewards_give_exactly_nothing():
  reward_PG = np.float32([[0.1] * 7, [1.1] * 7, [3] * 7, [0, 0, 0, 1, 0, 0, 0]])
  adv_PG = np.asarray(_group(reward_PG))
  assert not adv_PG[:3].any()
  assert adv_PG[3].any()
  assert int(_num_equal(reward_PG)) == 3


@hypothesis.given(
  hnp.arrays(np.float32, (3, 8), elements=st.sampled_from([0, 0.5, 1, 2]))
)
def test_advantages_of_a_group_have_mean_0_and_variance_1(reward_PG):
  adv_PG = np.asarray(_group(reward_PG))
  np.testing.assert_allclose(adv_PG.mean(1), 0, atol=1e-5)
  differs_P = reward_PG.max(1) > reward_PG.min(1)
  np.testing.assert_allclose((adv_PG**2).mean(1), differs_P, atol=1e-4)
  assert int(_num_equal(reward_PG)) == 3 - differs_P.sum()
  # Order inside the group does not matter, nor do other groups.
  np.testing.assert_allclose(
    _group(reward_PG[::-1, ::-1]), adv_PG[::-1, ::-1], atol=1e-5
  )
