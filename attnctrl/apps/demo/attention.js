// A picture with the attention to each region over it, to be shown or hidden. props.value = {picture, maps: [{name, color, png, about}], note},
// picture (WebP) and png in base64.
const stage = document.createElement('div'), legend = document.createElement('div'), note = document.createElement('p');
stage.className = 'stage';
legend.className = 'legend';
note.className = 'note';
const picture = (kind, data, text, name) => Object.assign(new Image(), {src: `data:image/${kind};base64,${data}`, alt: text, className: name});
const take = () => {
  const {picture: below, maps = [], note: said = ''} = props.value || {};
  note.textContent = said;
  stage.hidden = !below;
  if (!below) { stage.replaceChildren(); legend.replaceChildren(); return; }
  const layers = maps.map(({png, name}) => picture('png', png, `Attention to ${name}`, 'map'));
  stage.replaceChildren(picture('webp', below, 'The picture', 'below'), ...layers);
  legend.replaceChildren(...maps.map(({name, color, about}, index) => {
    const button = document.createElement('button'), title = document.createElement('b'), text = document.createElement('span');
    button.type = 'button';
    button.style.setProperty('--color', color);
    button.setAttribute('aria-pressed', 'true');
    title.textContent = name;
    text.textContent = about;
    button.append(title, text);
    button.addEventListener('click', () => {
      layers[index].hidden = !layers[index].hidden;
      button.setAttribute('aria-pressed', String(!layers[index].hidden));
    });
    return button;
  }));
};
watch('value', take);
element.replaceChildren(stage, legend, note);
take();
