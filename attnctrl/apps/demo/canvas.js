// Boxes drawn on a stage, each with a name, a prompt and a colour. props.value = {ratio, boxes: [{name, prompt, color, box}]},
// box = [left, top, right, bottom] as fractions.
const SMALLEST = 0.04, STEP = 1 / 64, KEPT = 50;
let boxes = [], ratio = 1, chosen = -1, drag = null, history = [], typing = false;

const make = (tag, attributes = {}, text = '') => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
};
const stage = make('div', {class: 'stage', role: 'group', 'aria-label': 'Picture. Drag to draw a box.'});
const empty = make('p', {class: 'empty'}, 'Drag to draw a box');
const bar = make('div', {class: 'bar'});
const rows = make('div', {class: 'rows'});
const button = (text, act) => {
  const node = make('button', {type: 'button'}, text);
  node.addEventListener('click', act);
  bar.append(node);
  return node;
};
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const round = (value) => Math.round(value * 1e4) / 1e4;
const copy = (value) => JSON.parse(JSON.stringify(value));
const label = (index) => boxes[index].name || `Box ${index + 1}`;

const remember = (before = copy(boxes)) => { history.push(before); if (history.length > KEPT) history.shift(); };
const publish = () => { props.value = {ratio, boxes: copy(boxes)}; };

const undo = () => {
  if (!history.length) return;
  boxes = history.pop();
  chosen = Math.min(chosen, boxes.length - 1);
  typing = false;
  draw(true);
  publish();
};
const remove = (index) => {
  remember();
  boxes.splice(index, 1);
  chosen = Math.min(index, boxes.length - 1);
  draw(true);
  publish();
  (stage.querySelector(`[data-index="${chosen}"]`) || add).focus();
};
const append = (box) => {
  const used = boxes.map((item) => item.color);
  const color = props.palette.find((item) => !used.includes(item)) || props.palette[boxes.length % props.palette.length];
  boxes.push({name: '', prompt: '', color, box});
  chosen = boxes.length - 1;
};
const write = (index) => rows.children[index].querySelector('.prompt').focus();

const add = button('Add box', () => {
  remember();
  append([0.25, 0.25, 0.75, 0.75]);
  draw(true);
  publish();
  write(chosen);
});
const back = button('Undo', undo);
const clear = button('Clear', () => {
  if (!boxes.length) return;
  remember();
  boxes = [];
  chosen = -1;
  draw(true);
  publish();
});

const change = (index, name, value) => {
  if (!typing) remember();
  typing = true;
  boxes[index][name] = value;
  draw();
  publish();
};
const row = (index) => {
  const node = make('div', {class: 'row'});
  const color = make('input', {type: 'color', 'aria-label': `Colour of box ${index + 1}`});
  const name = make('input', {class: 'name', placeholder: `Box ${index + 1}`, 'aria-label': `Name of box ${index + 1}`, maxlength: 40});
  const prompt = make('input', {class: 'prompt', placeholder: 'Prompt', 'aria-label': `Prompt of box ${index + 1}`, maxlength: 2000});
  const gone = make('button', {type: 'button', class: 'gone', 'aria-label': `Delete box ${index + 1}`}, '✕');
  for (const [input, field] of [[color, 'color'], [name, 'name'], [prompt, 'prompt']]) {
    input.value = boxes[index][field];
    input.addEventListener('input', () => change(index, field, input.value));
    input.addEventListener('blur', () => { typing = false; });
    input.addEventListener('focus', () => choose(index));
  }
  gone.addEventListener('click', () => remove(index));
  node.append(color, name, prompt, gone);
  return node;
};
const choose = (index) => { chosen = index; draw(); };

const draw = (anew = false) => {
  stage.style.aspectRatio = ratio;
  empty.hidden = boxes.length > 0;
  while (stage.querySelectorAll('.box').length > boxes.length) stage.querySelector('.box:last-of-type').remove();
  boxes.forEach((item, index) => {
    let node = stage.querySelector(`[data-index="${index}"]`);
    if (!node) {
      node = make('div', {class: 'box', tabindex: 0, role: 'button', 'data-index': index});
      node.append(make('span'), ...[0, 1, 2, 3].map((corner) => make('i', {'data-corner': corner})));
      node.addEventListener('focus', () => choose(index));
      stage.append(node);
    }
    const [left, top, right, bottom] = item.box.map((side) => side * 100);
    node.style.cssText = `left:${left}%;top:${top}%;width:${right - left}%;height:${bottom - top}%;--color:${item.color}`;
    node.classList.toggle('chosen', index === chosen);
    node.firstChild.textContent = item.prompt ? `${label(index)}: ${item.prompt}` : label(index);
    node.setAttribute('aria-label', `${label(index)}, ${item.prompt || 'no prompt'}. Arrows move, Shift and arrows resize, Delete removes.`);
  });
  if (anew || rows.children.length !== boxes.length) rows.replaceChildren(...boxes.map((_, index) => row(index)));
  [...rows.children].forEach((node, index) => node.classList.toggle('chosen', index === chosen));
  back.disabled = !history.length;
  clear.disabled = !boxes.length;
};

const point = (event) => {
  const area = stage.getBoundingClientRect();
  return [clamp((event.clientX - area.left) / area.width, 0, 1), clamp((event.clientY - area.top) / area.height, 0, 1)];
};
const between = (a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])].map(round);
const large = (box) => box[2] - box[0] >= SMALLEST && box[3] - box[1] >= SMALLEST;
const moved = (box, dx, dy) => {
  dx = clamp(dx, -box[0], 1 - box[2]);
  dy = clamp(dy, -box[1], 1 - box[3]);
  return [box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy].map(round);
};

stage.addEventListener('pointerdown', (event) => {
  if (event.button) return;
  const own = event.target.closest('.box'), at = point(event);
  drag = {from: at, before: copy(boxes), fresh: false, box: null, anchor: at};
  if (own) {
    choose(Number(own.dataset.index));
    own.focus({preventScroll: true});
    const box = boxes[chosen].box, corner = event.target.dataset.corner;
    drag.box = box;
    drag.anchor = corner === undefined ? null : [box['2002'[corner]], box['3311'[corner]]];
  }
  stage.setPointerCapture(event.pointerId);
  event.preventDefault();
});
stage.addEventListener('pointermove', (event) => {
  if (!drag) return;
  const at = point(event);
  if (!drag.anchor) {
    boxes[chosen].box = moved(drag.box, at[0] - drag.from[0], at[1] - drag.from[1]);
  } else {
    const box = between(drag.anchor, at);
    if (!drag.box && !drag.fresh) {
      if (box[2] - box[0] < SMALLEST / 2 && box[3] - box[1] < SMALLEST / 2) return;
      append(box);
      drag.fresh = true;
    }
    boxes[chosen].box = box;
  }
  draw();
});
const drop = () => {
  if (!drag) return;
  const {before, fresh, box} = drag;
  drag = null;
  if (!fresh && !box) { chosen = -1; draw(); return; }
  if (!large(boxes[chosen].box)) { boxes = before; chosen = fresh ? -1 : chosen; draw(true); return; }
  if (JSON.stringify(before) === JSON.stringify(boxes)) return;
  remember(before);
  draw(fresh);
  publish();
  if (fresh) write(chosen);
};
stage.addEventListener('pointerup', drop);
stage.addEventListener('pointercancel', drop);

element.addEventListener('keydown', (event) => {
  const arrows = {ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP]};
  const onBox = event.target.classList.contains('box');
  if ((event.ctrlKey || event.metaKey) && event.key === 'z' && event.target.tagName !== 'INPUT') undo();
  else if (onBox && (event.key === 'Delete' || event.key === 'Backspace')) remove(chosen);
  else if (onBox && event.key === 'Enter') write(chosen);
  else if (onBox && arrows[event.key]) {
    const [dx, dy] = arrows[event.key], box = boxes[chosen].box;
    const next = event.shiftKey
      ? [box[0], box[1], round(clamp(box[2] + dx, box[0] + SMALLEST, 1)), round(clamp(box[3] + dy, box[1] + SMALLEST, 1))]
      : moved(box, dx, dy);
    remember();
    boxes[chosen].box = next;
    draw();
    publish();
  } else return;
  event.preventDefault();
  event.stopPropagation();
});

const take = () => {
  const value = props.value || {};
  if (JSON.stringify(value.boxes) !== JSON.stringify(boxes)) history = [];
  boxes = copy(value.boxes || []);
  ratio = value.ratio || 1;
  chosen = Math.min(chosen, boxes.length - 1);
  draw(true);
};
watch('value', take);
stage.append(empty);
element.replaceChildren(stage, bar, rows);
take();
