"""A whole run of the toy, started as a program so that it can be killed."""

import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from r1jax.train import checkpoint, loop, metrics, workdir
from tests.train import toy

NUM_STEPS = 32
SAVE_EVERY = 8


class _SlowSource(toy.Source):
  """Takes its time, so that a kill can hit any moment."""

  def next(self, state):
    time.sleep(0.01)
    return super().next(state)


def main(path: str) -> None:
  """Runs, or goes on with, the run in a workdir."""
  workdir.prepare(path, {'num_steps': NUM_STEPS})
  source = _SlowSource(seed=3)
  with checkpoint.Checkpoints(
    f'{path}/checkpoints', max_to_keep=2
  ) as checkpoints:
    restored = checkpoints.restore_latest(
      toy.abstract_state(with_reference=True)
    )
    start = 0
    if restored is None:
      state = toy.make_state(with_reference=True)
    else:
      state, source_state, start = restored
      source.set_state(source_state)
    print('start', start, flush=True)
    with metrics.MetricWriter(path, start_step=start) as writer:

      def save(step, state):
        writer.checkpoint()
        checkpoints.save(step, state, source.get_state())

      loop.fit(
        state,
        toy.make_step(reference_every=7, num_microbatches=2),
        source,
        num_steps=NUM_STEPS,
        hooks=[loop.Every(SAVE_EVERY, save, last_step=NUM_STEPS)],
        write=writer.write,
      )


if __name__ == '__main__':
  main(sys.argv[1])
