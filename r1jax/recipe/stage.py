"""What every training stage shares: workdir, mesh, state, hooks, the loop."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from r1jax import config as config_lib
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import overlap, sharding
from r1jax.parallel import pipeline as pipeline_lib
from r1jax.recipe import (
  config_check,
  objective,
  origin,
  pipelined,
  tokenizer_files,
)
from r1jax.train import checkpoint, loop, metrics, optimizer, progress
from r1jax.train import state as state_lib
from r1jax.train import step as step_lib
from r1jax.train import workdir as workdir_lib

# Keys of a config that a resumed run may change.
MAY_DIFFER = (
  'train.num_steps',
  'train.checkpoint_every',
  'train.max_to_keep',
  'train.eval_every',
  'train.overlap',
  'rollout.gap_every',
  'rollout.samples_every',
  'mesh',
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop of a stage.

  Attributes:
    num_steps: Optimizer steps.
    num_microbatches: Parts of a batch whose gradients are added up.
    bias_update_speed: γ of the router bias; 0 leaves the bias alone.
    balance_coef: α of the sequence-wise balance loss.
    checkpoint_every: Steps between checkpoints; the last step is always saved.
    max_to_keep: Checkpoints that are kept.
    eval_every: Steps between held-out evaluations; 0 for the last step only.
    reference_every: Steps after which the reference becomes the policy; 0
      never. Stages without a reference leave it 0.
    overlap: On TPUs, let exchanges run beside products; off for a compiler
      that does not know how, see parallel/overlap.py.
  """

  num_steps: int
  num_microbatches: int
  bias_update_speed: float
  balance_coef: float
  checkpoint_every: int
  max_to_keep: int
  eval_every: int
  reference_every: int
  overlap: bool = True

  def __post_init__(self):
    check = functools.partial(config_lib.check_at_least, self)
    check(1, 'num_steps', 'num_microbatches', 'max_to_keep')
    check(0, 'bias_update_speed', 'balance_coef')
    check(0, 'checkpoint_every', 'eval_every', 'reference_every')


@dataclasses.dataclass
class Stage:
  """A stage that is set up: the shapes are known, nothing ran yet.

  Attributes:
    workdir: Where everything is kept.
    model: Shape of the model.
    train: The loop's config.
    optim: The optimizer's config.
    mesh: Devices.
    seed: Of the initialisation.
    title: For the progress line.
    with_reference: Keep a reference policy in the state.
    init_from: Workdir or Hugging Face folder whose variables it starts from;
      '' for random ones.
    tokenizer: Path of the tokenizer, which goes into the workdir; '' for the
      one that ships.
    untrained: Parts of the paths of parameters that the loss does not see.
    profile_steps: Steps to trace from step 10 on; 0 for none.
    pipeline: How stages take turns, where the mesh axis `pipe` has several.
  """

  workdir: epath.Path
  model: model_config.ModelConfig
  train: TrainConfig
  optim: optimizer.OptimConfig
  mesh: jax.sharding.Mesh
  seed: int
  title: str
  with_reference: bool = False
  init_from: str = ''
  tokenizer: str = ''
  untrained: tuple[str, ...] = ()
  profile_steps: int = 0
  pipeline: pipeline_lib.PipelineConfig = pipeline_lib.PipelineConfig()

  def __post_init__(self):
    config_check.check_kernels(self.model, self.mesh)
    self.optimizer = optimizer.make_optimizer(
      self.optim, self.train.num_steps, untrained=self.untrained
    )
    key = jax.random.key(self.seed)
    try:
      self.shardings = transformer.shardings(self.model, self.mesh)
    except ValueError as e:
      raise config_lib.UserError(str(e)) from e
    moe, speed = self.model.moe, self.train.bias_update_speed
    if speed and moe is not None and not moe.has_bias:
      raise config_lib.UserError(
        f'train.bias_update_speed={speed} needs model.moe.has_bias, this '
        'model has none: set it to 0'
      )
    trainable = self.optim.trainable
    paths = jax.tree_util.tree_flatten_with_path(self.shardings['params'])[0]
    if not any(trainable in jax.tree_util.keystr(path) for path, _ in paths):
      raise config_lib.UserError(
        f'optim.trainable={trainable!r} is in the path of no parameter'
      )
    self._init = lambda: sharding.unbox(transformer.init(self.model, key))
    # Outside `jax.set_mesh`, like `new_state`: one row initialises the model,
    # which does not divide over devices.
    self._abstract = state_lib.abstract_state(
      self._init,
      self.optimizer,
      self.shardings,
      with_reference=self.with_reference,
    )

  def abstract_state(self) -> state_lib.State:
    return self._abstract

  def new_state(self, say: Callable[[str], None]) -> state_lib.State:
    """Random variables, or those of `init_from`."""
    state = state_lib.init_state(
      self._init,
      self.optimizer,
      self.shardings,
      with_reference=self.with_reference,
    )
    if not self.init_from:
      return state
    variables, step = origin.load_variables(
      self.init_from, self.model, self.mesh, say=say
    )
    say(f'starting from step {step} of {self.init_from}')
    # Trained in float32, whatever they were saved in.
    variables = jax.tree.map(
      lambda x, own: x.astype(own.dtype), variables, state.variables
    )
    return state_lib.with_variables(state, variables)

  def make_gradient(self, loss_fn: objective.Objective) -> step_lib.Gradient:
    """Of a batch cut into microbatches: one at a time, or in a pipeline.

    Raises:
      UserError: The pipeline does not fit the model or the microbatches.
    """
    num_microbatches = self.train.num_microbatches
    if self.mesh.shape['pipe'] == 1:
      return step_lib.make_gradient(
        loss_fn,
        num_microbatches=num_microbatches,
        mesh=self.mesh,
        shardings=self.shardings,
      )
    try:
      return pipelined.make_gradient(
        loss_fn,
        self.pipeline,
        self.mesh,
        self.shardings,
        num_microbatches=num_microbatches,
      )
    except ValueError as e:
      raise config_lib.UserError(
        f'mesh.pipe={self.mesh.shape["pipe"]}, train.num_microbatches='
        f'{num_microbatches}: {e}'
      ) from e

  def make_train_step(self, loss_fn: objective.Objective) -> step_lib.TrainStep:
    """The jitted step, which donates its state."""
    train_step = step_lib.make_train_step(
      self.make_gradient(loss_fn),
      self.optimizer,
      update_router=self._update_router(),
      reference_every=self.train.reference_every * self.with_reference,
      schedule=optimizer.make_schedule(self.optim, self.train.num_steps),
      stop_on_overflow=(
        self.model.moe is not None
        and self.model.moe.exchange.on_overflow == 'stop'
      ),
    )
    shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state())
    return jax.jit(
      train_step,
      donate_argnums=0,
      out_shardings=(shardings, None),
      compiler_options=(
        overlap.compiler_options(self.mesh) if self.train.overlap else None
      ),
    )

  def _update_router(self) -> Callable[[Any, jax.Array], Any] | None:
    """The bias update at γ; None where nothing is to be updated."""
    speed = self.train.bias_update_speed
    if speed == 0 or self.model.moe is None:
      return None
    return functools.partial(transformer.update_router, speed=speed)

  def dry_run(self, loss_fn: objective.Objective, batch: Any) -> dict[str, Any]:
    """Compiles the train step for a batch's shapes and says what it takes."""
    state = self.abstract_state()
    count = sum(x.size for x in jax.tree.leaves(state.variables))
    with jax.set_mesh(self.mesh):
      seconds, memory = compile_program(
        self.make_train_step(loss_fn), state, batch
      )
    return {
      'parameters': count,
      'devices': self.mesh.size,
      'rows x tokens': 'x'.join(map(str, batch.tokens_BT.shape)),
      'compile seconds': seconds,
      'state and batch MiB': memory.argument_size_in_bytes / 2**20,
      'temporaries MiB': memory.temp_size_in_bytes / 2**20,
    }


def compile_program(program: Any, *args: Any) -> tuple[float, Any]:
  """Compiles a jitted program: the seconds, and its memory analysis."""
  start = time.perf_counter()
  compiled = program.lower(*args).compile()
  return time.perf_counter() - start, compiled.memory_analysis()


def run(
  stage: Stage,
  resolved: dict[str, Any],
  *,
  loss_fn: objective.Objective,
  make_source: Callable[[Callable[[int, dict[str, Any]], None]], loop.Source],
  evaluate: Callable[[Any], dict[str, float]] | None = None,
) -> state_lib.State:
  """Trains a stage from where its workdir stands to its last step.

  Args:
    stage: What is trained.
    resolved: The whole config, as it is kept in the workdir; where that has
      its tokenizer is put in here.
    loss_fn: Of the stage.
    make_source: Builds its source of batches, given `write(step, metrics)`.
    evaluate: Held-out metrics of variables.

  Returns:
    The last state.
  """
  train = stage.train
  train_step = stage.make_train_step(loss_fn)  # Raises before anything is.
  shown = progress.Progress(train.num_steps, title=stage.title)
  start = time.perf_counter()
  state = None
  is_new = not (stage.workdir / 'config.json').exists()
  if stage.init_from and sharding.first_says(is_new):
    # Before the workdir is claimed: a wrong `init_from` must leave nothing.
    state = stage.new_state(shown.say)
  name = tokenizer_files.name_in(stage.workdir, stage.tokenizer)
  resumed = workdir_lib.prepare(
    stage.workdir, resolved | {'tokenizer': name}, may_differ=MAY_DIFFER
  )
  if jax.process_index() == 0:
    tokenizer_files.keep(stage.workdir, stage.tokenizer)
  with checkpoint.Checkpoints(
    stage.workdir / 'checkpoints',
    max_to_keep=train.max_to_keep,
    say=shown.say,
  ) as checkpoints:
    restored = None
    if resumed:
      restored = checkpoints.restore_latest(stage.abstract_state())
    if restored is None:
      state = state or stage.new_state(shown.say)
      source_state, step = None, 0
    else:
      state, source_state, step = restored
      shown.say(f'{stage.title}: going on from step {step}')
    if step >= train.num_steps:
      shown.say(f'{stage.title}: finished already, at step {step}')
      if not (stage.workdir / 'summary.json').exists():  # Killed before it.
        write_summary(stage.workdir, train.num_steps, 0.0)
      return state
    with (
      jax.set_mesh(stage.mesh),
      metrics.MetricWriter(stage.workdir, start_step=step) as writer,
      shown,
    ):

      def write(at: int, values: dict[str, Any]) -> None:
        values = dict(values)
        counts_LE = values.pop('moe/counts', None)
        if counts_LE is not None:
          values |= load_metrics(counts_LE)
        writer.write(at, values)
        shown.update(at, values)

      source = make_source(write)
      if source_state is not None:
        source.set_state(source_state)

      def save(at: int, current: state_lib.State) -> None:
        writer.checkpoint()
        checkpoints.save(at, current, source.get_state())

      def evaluate_and_write(at: int, current: state_lib.State) -> None:
        write(at, evaluate(current.variables))

      hooks = []
      last = train.num_steps
      if evaluate is not None:
        evaluation = loop.Every(train.eval_every, evaluate_and_write, last)
        hooks.append(evaluation)
        if step > 0 and evaluation.due(step):
          # A SIGTERM left no time for it.
          if not sharding.first_says(writer.has(step, 'eval/')):
            evaluation(step, state)
      if stage.profile_steps:
        hooks += profile_hooks(stage.workdir, step, last, stage.profile_steps)
      hooks.append(loop.Every(train.checkpoint_every, save, last))
      state = loop.fit(
        state,
        train_step,
        source,
        num_steps=train.num_steps,
        hooks=hooks,
        save=save,
        write=write,
      )
      checkpoints.wait()
  write_summary(stage.workdir, train.num_steps, time.perf_counter() - start)
  return state


def load_metrics(counts_LE: Any) -> dict[str, float]:
  """Expert load as scalars: MaxVio of each layer, and the largest."""
  mean_L = counts_LE.mean(-1).clip(1e-9)
  vio_L = counts_LE.max(-1) / mean_L - 1
  each = {f'moe/max_vio/{i}': float(v) for i, v in enumerate(vio_L)}
  return {'moe/max_vio': float(vio_L.max())} | each


def write_summary(workdir: epath.Path, num_steps: int, seconds: float) -> None:
  """Adds the wall time of a run that reached the end to summary.json."""
  path = workdir / 'summary.json'
  before = json.loads(path.read_text())['seconds'] if path.exists() else 0.0
  summary = {'num_steps': num_steps, 'seconds': before + seconds}
  workdir_lib.write_text(path, json.dumps(summary, indent=2) + '\n')


def profile_hooks(
  workdir: epath.Path, start: int, last: int, num_steps: int
) -> Sequence[loop.Hook]:
  """Traces so many steps into workdir/profile, from the 11th of this run on.

  A run that ends before them is traced earlier; its first step, which
  compiles, is not.

  Raises:
    UserError: The run has not so many steps.
  """
  first = min(start + 10, last - num_steps)
  if first <= start:
    raise config_lib.UserError(
      f'profile_steps={num_steps}, but only {max(last - start - 1, 0)} steps '
      'can be traced: those after the first of this run'
    )
  folder = str(workdir / 'profile')
  return [
    loop.At(first, lambda *_: jax.profiler.start_trace(folder)),
    loop.At(first + num_steps, lambda *_: jax.profiler.stop_trace()),
  ]


def make_mesh(
  config: mesh_lib.MeshConfig, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """The mesh of (all) devices; a wrong size is the user's mistake."""
  try:
    return mesh_lib.make_mesh(config, devices)
  except ValueError as e:
    raise config_lib.UserError(str(e)) from e
