'use strict';

// The report reads without this: it adds values under the pointer to the
// charts and a search to the config.

function readNumbers(text) {
  return text.split(',').map(Number);
}

function format(value, percent) {
  if (percent) return (100 * value).toPrecision(3).replace(/\.0+$/, '') + '%';
  const size = Math.abs(value);
  if (size >= 1e6) return Number((value / 1e6).toPrecision(4)) + 'M';
  if (size >= 1e4) return Number((value / 1e3).toPrecision(4)) + 'k';
  if (size > 0 && size < 1e-3) {
    const [mantissa, exponent] = value.toExponential(2).split('e');
    return Number(mantissa) + 'e' + Number(exponent);
  }
  return String(Number(value.toPrecision(4)));
}

function nearest(sorted, wanted) {
  let low = 0;
  let high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle;
    else high = middle;
  }
  return wanted - sorted[low] < sorted[high] - wanted ? low : high;
}

function svgElement(name, attributes) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  return node;
}

function addHover(svg) {
  const [x0, x1, left, right] = readNumbers(svg.dataset.x);
  const [y0, y1, bottom, top, log] = readNumbers(svg.dataset.y);
  const percent = svg.dataset.percent === '1';
  const readout = svg.closest('figure').querySelector('.readout');
  const outputs = [...svg.closest('figure').querySelectorAll('.legend output')];
  if (outputs.length === 0) outputs.push(readout);
  const latest = outputs.map((output) => output.textContent);
  const f = log ? Math.log : (v) => v;
  const lines = [...svg.querySelectorAll('.line')].map((group) => ({
    group: group,
    steps: readNumbers(group.dataset.steps),
    values: readNumbers(group.dataset.values),
  }));
  let marks = [];

  function clear() {
    for (const mark of marks) mark.remove();
    marks = [];
    readout.textContent = '';
    outputs.forEach((output, i) => { output.textContent = latest[i]; });
  }

  function move(event) {
    clear();
    const box = svg.getBoundingClientRect();
    const width = svg.viewBox.baseVal.width;
    const px = (event.clientX - box.left) / box.width * width;
    const wanted = x0 + (px - left) / (right - left) * (x1 - x0);
    let shown = null;
    lines.forEach((line, n) => {
      const i = nearest(line.steps, wanted);
      const x = left + (line.steps[i] - x0) / (x1 - x0) * (right - left);
      const part = (f(line.values[i]) - f(y0)) / (f(y1) - f(y0));
      const y = bottom + part * (top - bottom);
      const dot = svgElement('circle', {class: 'dot', cx: x, cy: y, r: 3.5});
      line.group.append(dot);
      marks.push(dot);
      outputs[n].textContent = format(line.values[i], percent);
      if (shown === null) shown = {x: x, step: line.steps[i]};
    });
    const cursor = svgElement('line', {
      class: 'cursor', x1: shown.x, x2: shown.x, y1: top, y2: bottom,
    });
    svg.prepend(cursor);
    marks.push(cursor);
    const at = ' at ' + shown.step.toLocaleString('en');
    readout.textContent = (lines.length > 1 ? '' : readout.textContent) + at;
  }

  svg.addEventListener('pointermove', move);
  svg.addEventListener('pointerdown', move);
  svg.addEventListener('pointerleave', clear);
}

function addFilter(filter) {
  const search = filter.querySelector('input[type=search]');
  const only = filter.querySelector('input[type=checkbox]');
  const rows = filter.parentElement.querySelectorAll('tbody tr');

  function apply() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word)) ||
          (only !== null && only.checked && !row.classList.contains('differs'));
    }
  }

  filter.hidden = false;
  filter.addEventListener('input', apply);
}

document.querySelectorAll('svg.chart').forEach(addHover);
document.querySelectorAll('.filter').forEach(addFilter);
