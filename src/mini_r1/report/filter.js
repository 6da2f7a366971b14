for (const filter of document.querySelectorAll('.filter')) {
  const samples = [...filter.querySelectorAll('.sample')];
  const buttons = [...filter.querySelectorAll('button')];
  const show = (wanted) => {
    for (const sample of samples) {
      sample.hidden = wanted !== 'all' && !sample.dataset.tags.split(' ').includes(wanted);
    }
    const shown = samples.filter((sample) => !sample.hidden).length;
    filter.querySelector('[role=status]').textContent = `${shown} shown`;
  };
  for (const button of buttons) {
    button.addEventListener('click', () => {
      for (const other of buttons) other.setAttribute('aria-pressed', String(other === button));
      show(button.dataset.show);
    });
  }
}
