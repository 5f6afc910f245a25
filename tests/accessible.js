// What a checker of accessibility looks at, as far as a page like this needs it: WCAG 2.2, AA. Gives what is wrong.
() => {
  const wrong = [], seen = new Set();
  const visible = (e) => e.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  const tell = (what, e) => wrong.push(`${what}: ${e.outerHTML.slice(0, 160)}`);
  for (const e of document.querySelectorAll('[id]')) {
    if (seen.has(e.id)) tell('an id twice', e);
    seen.add(e.id);
  }
  for (const e of document.querySelectorAll('[for], [aria-labelledby]')) {
    for (const id of (e.getAttribute('for') || e.getAttribute('aria-labelledby')).split(' ')) {
      if (!document.getElementById(id)) tell('points nowhere', e);
    }
  }
  for (const e of document.querySelectorAll('input:not([type=hidden]), select, textarea')) {
    if (!e.closest('[aria-hidden=true]') && !e.labels.length && !e.ariaLabel) tell('no label', e);
  }
  for (const e of document.querySelectorAll('a[href], button, summary')) {
    if (!e.innerText.trim() && !e.ariaLabel) tell('no name', e);
    const box = e.getBoundingClientRect();
    const inline = e.closest('p.lead, p.small, td, p:not([class])');
    if (visible(e) && !e.matches('.skip') && !inline && (box.width < 24 || box.height < 24)) {
      if (!e.matches('.who a')) tell('too small to hit', e);  // these cover their row
    }
  }
  for (const e of document.querySelectorAll('img')) if (e.alt === null) tell('no alt', e);
  for (const e of document.querySelectorAll('svg')) {
    const named = e.getAttribute('role') === 'img' && e.hasAttribute('aria-labelledby');
    if (e.getAttribute('aria-hidden') !== 'true' && !named) tell('an unnamed picture', e);
  }
  for (const e of document.querySelectorAll('table')) if (!e.querySelector('th[scope=col]')) tell('no headings', e);
  for (const e of document.querySelectorAll('*')) {
    const scrolls = e.scrollWidth > e.clientWidth + 1 && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
    if (visible(e) && scrolls && e.tabIndex < 0 && !e.matches('html, body, input')) tell('scrolls by mouse only', e);
  }
  const levels = [...document.querySelectorAll('h1, h2, h3')].filter(visible).map((e) => +e.tagName[1]);
  if (levels.filter((l) => l === 1).length !== 1) wrong.push('not one h1');
  levels.forEach((l, i) => { if (i && l > levels[i - 1] + 1) wrong.push('a level of headings is left out'); });
  const frame = document.documentElement.lang && document.title && document.querySelector('header ~ main');
  if (!frame) wrong.push('no frame');

  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const parse = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let checked = 0;
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !visible(e)) continue;
    if (e.closest('.skip, .hidden, script, noscript, option')) continue;
    const chain = [];
    for (let p = e; p; p = p.parentElement) if (!(p instanceof SVGElement)) chain.unshift(p);
    const under = chain.reduce((below, p) => over(parse(getComputedStyle(p).backgroundColor), below), [255, 255, 255]);
    const style = getComputedStyle(e);
    const ink = over(parse(e instanceof SVGElement ? style.fill : style.color), under);
    const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if ((a + 0.05) / (b + 0.05) < (large ? 3 : 4.5)) tell(`contrast ${((a + 0.05) / (b + 0.05)).toFixed(2)}`, e);
    checked++;
  }
  if (checked < 5) wrong.push('there was nothing to check');
  return wrong;
}
