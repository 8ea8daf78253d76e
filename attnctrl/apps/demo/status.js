// What is going on, and how far it is. props.value = {text, done, total}; total 0 shows no bar.
const text = document.createElement('span'), bar = document.createElement('progress');
const take = () => {
  const {text: said = '', done = 0, total = 0} = props.value || {};
  if (text.textContent !== said) text.textContent = said;
  bar.hidden = !total;
  bar.max = total || 1;
  bar.value = done;
};
element.setAttribute('role', 'status');
element.replaceChildren(text, bar);
watch('value', take);
take();
