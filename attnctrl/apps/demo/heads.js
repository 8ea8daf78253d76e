// Layers x heads as a grid of toggles, coloured by their scores where there are any. props.value = {layers: [heads of layer 0, …],
// heads: [[layer, head, weight], …], scores: [[layer, head, score], …], about: what the scores are}.
const table = document.createElement('div');
const said = document.createElement('p');
table.className = 'table';
said.className = 'said';
said.setAttribute('aria-live', 'polite');
const scale = document.createElement('div');
scale.className = 'scale';
let layers = [], weights = new Map(), at = [0, 0], scores = [], about = '';

const key = (layer, head) => `${layer}.${head}`;
const cell = (layer, head) => table.querySelector(`[data-key="${key(layer, head)}"]`);
const publish = () => {
  const heads = [...weights].map(([name, weight]) => [...name.split('.').map(Number), weight]);
  props.value = {layers, heads: heads.sort((a, b) => a[0] - b[0] || a[1] - b[1]), scores, about};
};
const signed = (number) => `${number > 0 ? '+' : ''}${Number(number.toPrecision(3))}`;
const color = () => {
  const bound = Math.max(...scores.map(([, , score]) => Math.abs(score)), 1e-12);
  for (const node of table.querySelectorAll('.head')) {
    node.className = 'head';
    node.title = node.dataset.key;
    node.setAttribute('aria-label', `Layer ${node.dataset.key.replace('.', ', head ')}`);
  }
  for (const [layer, head, score] of scores) {
    const node = cell(layer, head);
    if (!node) continue;
    node.classList.add(score < 0 ? 'worse' : 'better');
    node.style.setProperty('--score', Math.abs(score) / bound);
    node.title += `: ${signed(score)}`;
    node.setAttribute('aria-label', `${node.getAttribute('aria-label')}, ${signed(score)}`);
  }
  scale.hidden = !scores.length;
  scale.replaceChildren(...[signed(-bound), '', signed(bound), about].map((text) => Object.assign(document.createElement('span'), {textContent: text})));
};
const show = () => {
  for (const node of table.querySelectorAll('.head')) {
    const weight = weights.get(node.dataset.key);
    node.setAttribute('aria-pressed', weight !== undefined);
    node.style.setProperty('--weight', weight ?? 0);
    node.tabIndex = node.dataset.key === key(...at) ? 0 : -1;
  }
  said.textContent = weights.size ? `${weights.size} chosen: ${[...weights.keys()].slice(0, 12).join(', ')}${weights.size > 12 ? ', …' : ''}` : 'No head is chosen';
};
const toggle = (names) => {
  const all = names.every((name) => weights.has(name));
  for (const name of names) all ? weights.delete(name) : weights.set(name, weights.get(name) ?? 1);
  show();
  publish();
};
const button = (text, name, act) => {
  const node = document.createElement('button');
  node.type = 'button';
  node.textContent = text;
  node.setAttribute('aria-label', name);
  node.addEventListener('click', act);
  return node;
};
const build = () => {
  const widest = Math.max(0, ...layers);
  table.style.setProperty('--heads', widest);
  table.replaceChildren(Object.assign(document.createElement('span'), {className: 'corner', textContent: 'Layer'}));
  for (let head = 0; head < widest; head++) table.append(Object.assign(document.createElement('span'), {textContent: head}));
  layers.forEach((count, layer) => {
    const row = button(layer, `All heads of layer ${layer}`, () => toggle(Array.from({length: count}, (_, head) => key(layer, head))));
    row.className = 'layer';
    table.append(row);
    for (let head = 0; head < widest; head++) {
      if (head >= count) { table.append(document.createElement('span')); continue; }
      const node = button('', '', () => toggle([key(layer, head)]));
      node.className = 'head';
      node.dataset.key = key(layer, head);
      node.addEventListener('focus', () => { at = [layer, head]; });
      table.append(node);
    }
  });
};
table.addEventListener('keydown', (event) => {
  const [dy, dx] = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key] || [];
  if (dx === undefined || !event.target.classList.contains('head')) return;
  const next = cell(at[0] + dy, at[1] + dx);
  if (next) { next.focus(); show(); }
  event.preventDefault();
});
const bar = document.createElement('div');
bar.className = 'bar';
bar.append(said, button('Clear', 'Choose no head', () => { weights.clear(); show(); publish(); }));
const take = () => {
  const value = props.value || {};
  if (JSON.stringify(value.layers || []) !== JSON.stringify(layers)) { layers = value.layers || []; at = [0, 0]; build(); }
  weights = new Map((value.heads || []).map(([layer, head, weight]) => [key(layer, head), weight]));
  [scores, about] = [value.scores || [], value.about || ''];
  color();
  show();
};
watch('value', take);
element.replaceChildren(table, scale, bar);
take();
