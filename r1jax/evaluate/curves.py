"""Which metrics become which charts, and the report's section of curves."""

import dataclasses
import fnmatch
from collections.abc import Sequence

from r1jax.evaluate import charts, markup
from r1jax.evaluate import runs as runs_lib

_UNIT = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Chart:
  """One chart of the report.

  Attributes:
    title: Shown above it.
    keys: Metric names, wildcards allowed; each that exists is a line.
    unit: Of the value axis, '' if it has none.
    percent: Whether values are shares.
    domain: Fixed value axis, None to fit the values.
    log: Whether a logarithmic axis suits, see charts.draw.
  """

  title: str
  keys: tuple[str, ...]
  unit: str = ''
  percent: bool = False
  domain: tuple[float, float] | None = None
  log: bool = False


CATALOGUE = (
  Chart('Reward', ('rl/reward',)),
  Chart('Accuracy of samples', ('rl/accuracy',), '', True, _UNIT),
  Chart(
    'Held-out accuracy',
    ('eval/accuracy', 'eval/pass@1', 'eval/greedy'),
    '',
    True,
    _UNIT,
  ),
  Chart('Format followed', ('rl/format',), '', True, _UNIT),
  Chart('Completion length', ('rl/length',), 'tokens'),
  Chart('Training loss', ('train/loss',), 'nats'),
  Chart('Held-out loss', ('eval/loss',), 'nats per token'),
  Chart('Held-out bits per byte', ('eval/bits_per_byte',), 'bits'),
  Chart('KL to the reference', ('rl/kl',), 'nats per token', log=True),
  Chart('Entropy', ('rl/entropy',), 'nats per token'),
  Chart(
    'Sampler gap', ('rl/gap_mean', 'rl/gap_max'), '|Δ log p|, nats', log=True
  ),
  Chart('Ratios outside [0.9, 1.1]', ('rl/gap_outside',), 'of tokens', True),
  Chart('Groups without variance', ('rl/zero_variance_groups',)),
  Chart('Clipped tokens', ('rl/clip_fraction',), 'of tokens', True),
  Chart('Expert load', ('moe/max_vio*',), 'MaxVio, max/mean − 1'),
  Chart('Devices of experts', ('rl/expert_balance*',), 'load, max/mean'),
  Chart('MTP loss', ('mtp/loss*',), 'nats per token'),
  Chart('MTP drafts accepted', ('mtp/accept*',), '', True, _UNIT),
  Chart('Gradient norm', ('train/grad_norm',), log=True),
  Chart('Throughput', ('perf/tokens_per_second',), 'tokens/s'),
  Chart('Step time', ('perf/step_seconds',), 'seconds'),
)


def section(runs: Sequence[runs_lib.Run]) -> markup.Html | None:
  """Draws every metric of every run; None if there are none."""
  blocks = [block for run in runs if (block := _run_block(run))]
  if not blocks:
    return None
  return markup.tag('section', markup.tag('h2', 'Curves'), blocks, id='curves')


def figure(
  title: str,
  unit: str,
  lines: Sequence[charts.Line],
  *,
  percent: bool = False,
  domain: tuple[float, float] | None = None,
  log: bool = False,
  marks: Sequence[float] = (),
) -> markup.Html:
  """One chart with its title, latest value and, for several lines, legend."""
  last = [
    charts.number(float(line.values_N[-1]), percent=percent) for line in lines
  ]
  legend, readout = None, last[0]
  if len(lines) > 1:
    # Hovering shows the step above and each line's value in the legend.
    readout = ''
    legend = markup.tag(
      'div',
      (
        markup.tag(
          'span', line.label, ' ', markup.tag('output', v), class_=f'c{i % 8}'
        )
        for i, (line, v) in enumerate(zip(lines, last))
      ),
      class_='legend',
    )
  return markup.tag(
    'figure',
    markup.tag(
      'figcaption',
      markup.tag('b', title),
      markup.tag('span', unit, class_='unit') if unit else None,
      markup.tag('output', readout, class_='readout'),
    ),
    legend,
    charts.draw(
      lines,
      percent=percent,
      domain=domain,
      log=log,
      marks=marks,
      label=f'{title}, last value {", ".join(last)}',
    ),
  )


def _run_block(run: runs_lib.Run) -> markup.Html | None:
  """The charts of one run; what the catalogue does not name is folded away."""
  metrics = runs_lib.flat_metrics(run.metrics)
  keys = runs_lib.metric_keys(metrics)
  lines = {key: charts.Line(key, *runs_lib.curve(metrics, key)) for key in keys}
  figures, used = [], set()
  for chart in CATALOGUE:
    names = [
      key
      for pattern in chart.keys
      for key in keys
      if fnmatch.fnmatchcase(key, pattern)
    ]
    if names:
      used.update(names)
      chosen = [
        dataclasses.replace(lines[n], label=n.partition('/')[2]) for n in names
      ]
      figures.append(
        figure(
          chart.title,
          chart.unit,
          chosen,
          percent=chart.percent,
          domain=chart.domain,
          log=chart.log,
        )
      )
  other = [figure(k, '', [lines[k]], log=True) for k in keys if k not in used]
  if not figures and not other:
    return None
  steps = max(float(line.steps_N[-1]) for line in lines.values())
  return markup.tag(
    'div',
    markup.tag(
      'h3',
      run.name,
      ' ',
      markup.tag('small', f'{steps:,.0f} steps'),
    ),
    markup.tag('div', figures, class_='charts') if figures else None,
    markup.tag(
      'details',
      markup.tag('summary', f'Other metrics ({len(other)})'),
      markup.tag('div', other, class_='charts'),
    )
    if other
    else None,
  )
