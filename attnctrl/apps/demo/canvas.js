// Boxes and painted masks on a stage, each with a name, a prompt and a colour. props.value = {ratio, boxes: [{name, prompt, color, box}]},
// box = [left, top, right, bottom] as fractions; a painted one has mask instead, a PNG in base64, white inside.
const SMALLEST = 0.04, STEP = 1 / 64, KEPT = 50, SIDE = 256; // SIDE: pixels of a mask's longer side
let boxes = [], ratio = 1, chosen = -1, drag = null, history = [], typing = false, tool = 'Box';

const make = (tag, attributes = {}, text = '') => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
};
const stage = make('div', {class: 'stage', role: 'group', 'aria-label': 'Picture. Drag to draw a box.'});
const empty = make('p', {class: 'empty'});
const brush = make('div', {class: 'brush', hidden: ''});
const tools = make('div', {class: 'bar', role: 'toolbar', 'aria-label': 'Tools'});
const bar = make('div', {class: 'bar'});
const rows = make('div', {class: 'rows'});
const button = (text, act, place = bar) => {
  const node = make('button', {type: 'button'}, text);
  node.addEventListener('click', act);
  place.append(node);
  return node;
};
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const round = (value) => Math.round(value * 1e4) / 1e4;
const copy = (value) => JSON.parse(JSON.stringify(value));
const painted = (index) => boxes[index]?.mask !== undefined;
const kind = (index) => `${painted(index) ? 'Mask' : 'Box'} ${index + 1}`;
const label = (index) => boxes[index].name || kind(index);
const nodeOf = (index) => stage.querySelector(`[data-index="${index}"]`);
const handles = () => [0, 1, 2, 3].map((corner) => make('i', {'data-corner': corner}));
const opposite = (box, corner) => [box['2002'[corner]], box['3311'[corner]]];

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
  (nodeOf(chosen)?.querySelector('.frame') || nodeOf(chosen) || add).focus();
};
const append = (place) => {
  const used = boxes.map((item) => item.color);
  const color = props.palette.find((item) => !used.includes(item)) || props.palette[boxes.length % props.palette.length];
  boxes.push({name: '', prompt: '', color, ...place});
  chosen = boxes.length - 1;
};
const write = (index) => rows.children[index].querySelector('.prompt').focus();

const choices = ['Box', 'Brush', 'Eraser'].map((name) => button(name, () => { tool = name; draw(); }, tools));
const size = make('input', {type: 'range', min: 2, max: 40, value: 12, 'aria-label': 'Size of the brush'});
tools.append(size);
const add = button('Add box', () => {
  if (tool !== 'Box') { chosen = -1; tool = 'Brush'; draw(); return; }
  remember();
  append({box: [0.25, 0.25, 0.75, 0.75]});
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
  const node = make('div', {class: 'row'}), which = kind(index).toLowerCase();
  const color = make('input', {type: 'color', 'aria-label': `Colour of ${which}`});
  const name = make('input', {class: 'name', placeholder: kind(index), 'aria-label': `Name of ${which}`, maxlength: 40});
  const prompt = make('input', {class: 'prompt', placeholder: 'Prompt', 'aria-label': `Prompt of ${which}`, maxlength: 2000});
  const gone = make('button', {type: 'button', class: 'gone', 'aria-label': `Delete ${which}`}, '✕');
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

// A painted region: a label, the frame of what is painted, `ink`, white on nothing, and the same in the region's colour on the stage.
const sheet = () => {
  const side = Math.max(ratio, 1 / ratio);
  return Object.assign(document.createElement('canvas'), {
    width: Math.round(ratio < 1 ? SIDE / side : SIDE), height: Math.round(ratio < 1 ? SIDE : SIDE / side),
  });
};
const tint = (node, color) => {
  const shown = node.lastChild, pen = shown.getContext('2d');
  Object.assign(shown, {width: node.ink.width, height: node.ink.height});
  pen.drawImage(node.ink, 0, 0);
  pen.globalCompositeOperation = 'source-in';
  pen.fillStyle = color;
  pen.fillRect(0, 0, shown.width, shown.height);
};
const lay = (node, box) => { // label and frame around what is painted
  const [left, top, right, bottom] = (node.bounds = box).map((side) => `${side * 100}%`);
  node.firstChild.style.cssText = `left:${left};top:${top}`;
  node.children[1].style.cssText = `left:${left};top:${top};right:calc(100% - ${right});bottom:calc(100% - ${bottom})`;
};
const measure = (node) => { // false where nothing is painted
  const {width, height} = node.ink, pixels = node.ink.getContext('2d').getImageData(0, 0, width, height).data;
  let left = width, top = -1, right = 0, bottom = 0;
  for (let at = 3; at < pixels.length; at += 4) {
    if (pixels[at] < 128) continue;
    const place = (at - 3) / 4, x = place % width;
    bottom = Math.floor(place / width);
    if (top < 0) top = bottom;
    left = Math.min(left, x);
    right = Math.max(right, x);
  }
  if (top >= 0) lay(node, [left / width, top / height, (right + 1) / width, (bottom + 1) / height]);
  return top >= 0;
};
const load = (node, text, color) => {
  const picture = new Image();
  node.text = text;
  picture.onload = () => {
    if (node.text !== text) return;
    const pen = node.ink.getContext('2d'), {width, height} = node.ink;
    pen.globalCompositeOperation = 'source-over';
    pen.drawImage(picture, 0, 0, width, height);
    const pixels = pen.getImageData(0, 0, width, height);
    for (let at = 0; at < pixels.data.length; at += 4) {
      pixels.data[at + 3] = pixels.data[at];
      pixels.data.fill(255, at, at + 3);
    }
    pen.putImageData(pixels, 0, 0);
    measure(node);
    tint(node, color);
  };
  picture.src = `data:image/png;base64,${text}`;
};
const saved = (node) => {
  const flat = Object.assign(document.createElement('canvas'), {width: node.ink.width, height: node.ink.height});
  const pen = flat.getContext('2d');
  pen.fillRect(0, 0, flat.width, flat.height);
  pen.drawImage(node.ink, 0, 0);
  return flat.toDataURL('image/png').split(',')[1];
};
const stroke = (from, to) => {
  const node = nodeOf(chosen), {width, height} = node.ink, pen = node.ink.getContext('2d');
  pen.globalCompositeOperation = tool === 'Eraser' ? 'destination-out' : 'source-over';
  Object.assign(pen, {lineWidth: size.value / 100 * Math.max(width, height), lineCap: 'round', lineJoin: 'round', strokeStyle: '#fff'});
  pen.beginPath();
  pen.moveTo(from[0] * width, from[1] * height);
  pen.lineTo(to[0] * width, to[1] * height);
  pen.stroke();
  tint(node, boxes[chosen].color);
};
const fit = (node, held, from, to) => { // what was painted in one frame, into another
  if (node.ink === held) node.ink = sheet();
  const {width, height} = node.ink, pen = node.ink.getContext('2d');
  const source = [from[0] * held.width, from[1] * held.height, (from[2] - from[0]) * held.width, (from[3] - from[1]) * held.height];
  const target = [to[0] * width, to[1] * height, (to[2] - to[0]) * width, (to[3] - to[1]) * height];
  pen.globalCompositeOperation = 'copy';
  pen.imageSmoothingEnabled = false;
  pen.drawImage(held, ...source.map(Math.round), ...target.map(Math.round));
  lay(node, to);
  tint(node, boxes[chosen].color);
};
const maskAt = ([x, y]) => boxes.findLastIndex((_, index) => {
  const {ink} = nodeOf(index);
  if (!ink) return false;
  const at = [x * ink.width, y * ink.height].map(Math.floor);
  return ink.getContext('2d').getImageData(...at, 1, 1).data[3] > 127;
});

const nodeFor = (index) => {
  if (painted(index)) {
    const node = make('div', {class: 'paint', 'data-index': index});
    const frame = make('div', {class: 'frame', tabindex: 0, role: 'button'});
    frame.append(...handles());
    frame.addEventListener('focus', () => choose(index));
    node.append(make('span'), frame, document.createElement('canvas'));
    node.ink = sheet();
    return node;
  }
  const node = make('div', {class: 'box', tabindex: 0, role: 'button', 'data-index': index});
  node.append(make('span'), ...handles());
  node.addEventListener('focus', () => choose(index));
  return node;
};
const draw = (anew = false) => {
  stage.style.aspectRatio = ratio;
  stage.classList.toggle('painting', tool !== 'Box');
  choices.forEach((node) => node.setAttribute('aria-pressed', node.textContent === tool));
  size.hidden = tool === 'Box';
  brush.hidden = true;
  add.textContent = tool === 'Box' ? 'Add box' : 'New mask';
  empty.textContent = tool === 'Box' ? 'Drag to draw a box' : 'Paint a mask';
  empty.hidden = boxes.length > 0;
  for (const node of stage.querySelectorAll('[data-index]')) {
    const index = Number(node.dataset.index);
    if (index >= boxes.length || painted(index) !== Boolean(node.ink)) node.remove();
  }
  boxes.forEach((item, index) => {
    const node = nodeOf(index) || nodeFor(index);
    if (!node.isConnected) stage.append(node);
    node.classList.toggle('chosen', index === chosen);
    node.firstChild.textContent = item.prompt ? `${label(index)}: ${item.prompt}` : label(index);
    node.style.cssText = `z-index:${index + 1};--color:${item.color}`;
    const told = `${label(index)}, ${item.prompt || 'no prompt'}. Arrows move, Shift and arrows resize, Delete removes.`;
    (painted(index) ? node.children[1] : node).setAttribute('aria-label', told);
    if (painted(index)) {
      if (item.mask && node.text !== item.mask) {
        node.ink = sheet();
        load(node, item.mask, item.color);
      } else tint(node, item.color);
      return;
    }
    const [left, top, right, bottom] = item.box.map((side) => side * 100);
    node.style.cssText += `;left:${left}%;top:${top}%;width:${right - left}%;height:${bottom - top}%`;
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
  if (event.button || drag) return;
  if (tool !== 'Box') {
    const at = point(event), before = copy(boxes);
    event.preventDefault();
    if (tool === 'Eraser' && !painted(chosen)) chosen = maskAt(at);
    if (tool === 'Eraser' && chosen < 0) return;
    if (!painted(chosen)) {
      append({mask: ''});
      draw(true);
    }
    drag = {stroke: at, before};
    stroke(at, at);
    stage.setPointerCapture(event.pointerId);
    return;
  }
  const own = event.target.closest('.box, .paint'), at = point(event), corner = event.target.dataset.corner;
  const index = own ? Number(own.dataset.index) : maskAt(at);
  drag = {from: at, before: copy(boxes), fresh: false, box: null, anchor: at};
  if (index >= 0) {
    const node = nodeOf(index);
    choose(index);
    (node.querySelector('.frame') || node).focus({preventScroll: true});
    drag.held = node.ink;
    drag.box = node.ink ? node.bounds : boxes[index].box;
    drag.anchor = corner === undefined ? null : opposite(drag.box, corner);
  }
  stage.setPointerCapture(event.pointerId);
  event.preventDefault();
});
stage.addEventListener('pointermove', (event) => {
  if (tool !== 'Box') {
    const area = stage.getBoundingClientRect(), wide = size.value / 100 * Math.max(area.width, area.height);
    brush.style.cssText = `left:${event.clientX - area.left}px;top:${event.clientY - area.top}px;width:${wide}px;height:${wide}px`;
    brush.hidden = event.pointerType === 'touch';
  }
  if (!drag) return;
  const at = point(event);
  if (drag.stroke) {
    stroke(drag.stroke, at);
    drag.stroke = at;
    return;
  }
  if (drag.held) {
    const to = drag.anchor ? between(drag.anchor, at) : moved(drag.box, at[0] - drag.from[0], at[1] - drag.from[1]);
    if (!drag.anchor || large(to)) fit(nodeOf(chosen), drag.held, drag.box, to);
    return;
  }
  if (!drag.anchor) {
    boxes[chosen].box = moved(drag.box, at[0] - drag.from[0], at[1] - drag.from[1]);
  } else {
    const box = between(drag.anchor, at);
    if (!drag.box && !drag.fresh) {
      if (box[2] - box[0] < SMALLEST / 2 && box[3] - box[1] < SMALLEST / 2) return;
      append({box});
      drag.fresh = true;
    }
    boxes[chosen].box = box;
  }
  draw();
});
const drop = () => {
  if (!drag) return;
  const {before, fresh, box} = drag, node = nodeOf(chosen);
  if (drag.stroke || drag.held) {
    const still = node.ink === drag.held;
    drag = null;
    if (still) return;
    if (measure(node)) boxes[chosen].mask = node.text = saved(node);
    else {
      boxes.splice(chosen, 1);
      chosen = -1;
    }
    remember(before);
    draw(chosen < 0);
    publish();
    return;
  }
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
stage.addEventListener('pointerleave', () => { brush.hidden = true; });

element.addEventListener('keydown', (event) => {
  const arrows = {ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP]};
  const onBox = event.target.matches('.box, .frame');
  if ((event.ctrlKey || event.metaKey) && event.key === 'z' && !event.target.matches('input:not([type="range"])')) undo();
  else if (onBox && (event.key === 'Delete' || event.key === 'Backspace')) remove(chosen);
  else if (onBox && event.key === 'Enter') write(chosen);
  else if (onBox && arrows[event.key]) {
    const [dx, dy] = arrows[event.key], node = nodeOf(chosen), box = node.ink ? node.bounds : boxes[chosen].box;
    const next = event.shiftKey
      ? [box[0], box[1], round(clamp(box[2] + dx, box[0] + SMALLEST, 1)), round(clamp(box[3] + dy, box[1] + SMALLEST, 1))]
      : moved(box, dx, dy);
    remember();
    if (node.ink) {
      fit(node, node.ink, box, next);
      boxes[chosen].mask = node.text = saved(node);
    } else boxes[chosen].box = next;
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
stage.append(empty, brush);
element.replaceChildren(stage, tools, bar, rows);
take();
