// Answers side by side, each under the picture; a click on a word lays over it where the model looked when it wrote that word.
// props.value = {picture, answers: [{title, words: [{text, png, about}], sinks: {png, about}, said, note}]}; picture (WebP) and png in base64.
const make = (tag, className, text = '') => Object.assign(document.createElement(tag), {className, textContent: text});
const image = (kind, data, alt, className) => Object.assign(new Image(), {src: `data:image/${kind};base64,${data}`, alt, className});
const toggle = (node, act) => {
  node.type = 'button';
  node.setAttribute('aria-pressed', 'false');
  node.addEventListener('click', act);
  return node;
};
const build = (below, {title = '', words = [], sinks, said, note: told = ''}) => {
  const box = make('section', 'answer'), stage = make('div', 'stage'), text = make('p', 'words'), note = make('p', 'note', told);
  const ground = image('webp', below, 'The picture', 'below');
  const map = Object.assign(new Image(), {className: 'map', hidden: true});
  ground.onload = () => { stage.style.maxWidth = `${Math.min(512, 480 * ground.naturalWidth / ground.naturalHeight)}px`; };
  stage.append(ground, map);
  note.setAttribute('aria-live', 'polite');
  if (words.some(({png}) => png)) note.textContent = 'Click a word to see where the model looked when it wrote it.';
  const start = note.textContent;
  const show = (chosen, {text: word, png, about}) => {
    const on = chosen.getAttribute('aria-pressed') !== 'true';
    for (const node of text.querySelectorAll('button')) node.setAttribute('aria-pressed', String(on && node === chosen));
    if (on) Object.assign(map, {src: `data:image/png;base64,${png}`, alt: `Attention while ${word.trim()} was written`});
    map.hidden = !on;
    stage.classList.toggle('looked', on);
    note.textContent = on ? `${word.trim()}: ${about}` : start;
  };
  for (const word of words) {
    const lead = word.text.match(/^\s*/)[0], rest = word.text.slice(lead.length);
    text.append(lead);
    if (!word.png) { text.append(rest); continue; }
    const node = toggle(make('button', '', rest), () => show(node, word));
    text.append(node);
  }
  if (title) box.append(make('h3', '', title));
  box.append(stage);
  if (title) box.append(text, note);
  if (sinks) {
    const marks = Object.assign(image('png', sinks.png, 'Attention sinks', 'map sinks'), {hidden: true});
    stage.append(marks);
    const node = toggle(make('button', 'mark'), () => {
      marks.hidden = !marks.hidden;
      node.setAttribute('aria-pressed', String(!marks.hidden));
    });
    node.append(make('b', '', 'Sinks'), make('span', '', sinks.about));
    box.append(node);
    node.click();
  }
  if (said) {
    const more = document.createElement('details');
    more.append(make('summary', '', 'What the controls did'), make('pre', '', said));
    box.append(more);
  }
  return box;
};
const place = make('div', 'answers');
const take = () => {
  const {picture, answers = []} = props.value || {};
  place.replaceChildren(...(picture ? (answers.length ? answers : [{}]).map((answer) => build(picture, answer)) : []));
};
watch('value', take);
element.replaceChildren(place);
take();
