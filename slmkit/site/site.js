// Theme, menu, copy buttons, search, tables: plain JavaScript that needs no network and asks for none. Without it every page can be read.
(() => {
  const $ = (s, at = document) => at.querySelector(s), $$ = (s, at = document) => [...at.querySelectorAll(s)];
  const root = document.documentElement, base = $('script[src$="site.js"]').getAttribute('src').slice(0, -7);

  // light and dark: what the reader chose, else what the system says
  const dark = () => getComputedStyle(root).colorScheme === 'dark' || !root.dataset.theme && matchMedia('(prefers-color-scheme: dark)').matches;
  $('.theme').onclick = () => { root.dataset.theme = dark() ? 'light' : 'dark'; try { localStorage.theme = root.dataset.theme } catch (e) {} };

  // the menu of narrow screens
  const menu = $('.menu'), side = $('#site-sidebar');
  const turn = open => { side.classList.toggle('open', open); menu.setAttribute('aria-expanded', open) };
  menu.onclick = () => turn(!side.classList.contains('open'));
  const here = $('.sidebar details [aria-current=page]');
  if (here) side.scrollTop = here.offsetTop - side.clientHeight / 3;

  // copy
  for (const box of $$('.code')) {
    const b = document.createElement('button');
    b.type = 'button'; b.className = 'copy'; b.textContent = 'Copy';
    b.onclick = async () => {
      const text = $('pre', box).textContent;
      try { await navigator.clipboard.writeText(text) }
      catch (e) { const r = document.createRange(); r.selectNodeContents($('pre', box)); getSelection().removeAllRanges(); getSelection().addRange(r); document.execCommand('copy') }
      b.textContent = 'Copied'; setTimeout(() => b.textContent = 'Copy', 1500);
    };
    box.append(b);
  }

  // where one is on the page
  const entries = new Map($$('.toc a').map(a => [a.hash.slice(1), a]));
  if (entries.size) {
    const heads = [...entries.keys()].map(id => document.getElementById(id)).filter(Boolean);
    const mark = () => {
      const at = heads.filter(h => h.getBoundingClientRect().top < 120).pop() || heads[0];
      for (const [id, a] of entries) id === at?.id ? a.setAttribute('aria-current', 'true') : a.removeAttribute('aria-current');
    };
    addEventListener('scroll', mark, { passive: true }); mark();
  }
  const reveal = () => { const to = location.hash ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null; for (let d = to?.closest('details'); d; d = d.parentElement.closest('details')) d.open = true; if (to?.tagName === 'DETAILS') to.open = true };
  addEventListener('hashchange', reveal); reveal();

  // search: its words are fetched when the box is first used; a script can be read from a folder, a JSON file can't
  const box = $('#site-find'), list = $('#site-found'); let words, at = -1;
  const load = () => words || (words = new Promise(done => { const s = document.createElement('script'); s.src = base + 'search.js'; s.onload = () => done(window.slmkitWords.map(e => [...e, [e[4], e[2], e[3]].map(x => x.toLowerCase())])); s.onerror = () => done([]); document.head.append(s) }));
  const score = (e, terms) => {
    let n = 0; const [title, head, text] = e[5];
    for (const t of terms) {
      const s = Math.max(title === t || head === t ? 60 : 0, title.includes(t) ? 12 + 8 * title.startsWith(t) - 3 * !!head : 0, head.includes(t) ? 9 + 6 * head.startsWith(t) : 0, text.includes(t) ? 2 : 0);
      if (!s) return 0; n += s;
    }
    return n + !e[1] + (!e[1] && title.includes(terms.join(' ')) ? 30 : 0); // a page that is called so comes first
  };
  const safe = s => s.replace(/[&<>"]/g, c => ({ '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;' })[c]);
  const marked = (s, terms) => terms.reduce((h, t) => t.length < 2 ? h : h.replace(new RegExp('(' + safe(t).replace(/[.*+?^${}()|[\]\\]/g, '\\$&') + ')(?![^<]*>)', 'ig'), '<mark>$1</mark>'), safe(s));
  const around = (text, terms) => { const i = text.toLowerCase().indexOf(terms.find(t => text.toLowerCase().includes(t)) || ''); return (i > 50 ? '… ' : '') + text.slice(Math.max(0, i - 40), i + 120) };
  const close = () => { list.hidden = true; at = -1; box.setAttribute('aria-expanded', 'false'); box.removeAttribute('aria-activedescendant') };
  const find = async () => {
    const terms = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (!terms.length) return close();
    const found = (await load()).map(e => [score(e, terms), e]).filter(x => x[0]).sort((a, b) => b[0] - a[0]).slice(0, 14);
    list.innerHTML = found.map(([, [url, id, head, text, title]], i) => `<li role="option" id="f${i}"><a tabindex="-1" href="${base}${url}${id ? '#' + encodeURIComponent(id) : ''}">${marked(title, terms)}${head ? ' › ' + marked(head, terms) : ''}<small>${marked(around(text, terms), terms)}</small></a></li>`).join('') || '<li><p>Nothing found.</p></li>';
    list.hidden = false; at = -1; box.setAttribute('aria-expanded', 'true');
  };
  const pick = i => { const items = $$('[role=option]', list); if (!items.length) return; at = (i + items.length) % items.length; items.forEach((x, j) => x.setAttribute('aria-selected', j === at)); items[at].scrollIntoView({ block: 'nearest' }); box.setAttribute('aria-activedescendant', items[at].id) };
  box.onfocus = load; box.oninput = find;
  box.onkeydown = e => {
    if (e.key === 'ArrowDown' || e.key === 'ArrowUp') { pick(at + (e.key === 'ArrowDown' ? 1 : at < 0 ? 0 : -1)); e.preventDefault() }
    else if (e.key === 'Enter') { const a = $(`#f${Math.max(at, 0)} a`); if (a) location.href = a.href }
    else if (e.key === 'Escape') { close(); box.blur() }
  };
  addEventListener('click', e => { if (!e.target.closest('.find')) close() });
  addEventListener('keydown', e => {
    if (e.key === '/' && !/INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName)) { box.focus(); e.preventDefault() }
    if (e.key === 'Escape' && side.classList.contains('open')) { turn(false); menu.focus() }
  });

  // tables that filter and sort (the ledger); the field map brings its own script
  const asked = new URLSearchParams(location.search);
  for (const bar of $$('.bar[data-for]')) {
    const table = document.getElementById(bar.dataset.for), body = $('tbody', table), rows = $$('tr', body), note = document.getElementById(bar.dataset.for + '-n');
    const text = new Map(rows.map(r => [r, r.textContent.toLowerCase()])), input = $('input', bar), picks = $$('select', bar); let by = '', down = 1;
    const show = () => {
      const terms = input.value.toLowerCase().split(/\s+/).filter(Boolean); let n = 0;
      for (const r of rows) { const ok = picks.every(p => !p.value || r.dataset[p.dataset.filter] === p.value) && terms.every(t => text.get(r).includes(t)); r.hidden = !ok; n += ok }
      note.textContent = `${n} of ${rows.length}`;
    };
    const sort = k => {
      down = by === k ? -down : 1; by = k;
      rows.sort((a, b) => { const [x, y] = [a.dataset[k], b.dataset[k]]; return !x - !y || down * x.localeCompare(y, 'en', { numeric: true }) * (isNaN(x) || isNaN(y) ? 1 : 0) || down * (x - y) || 0 });
      body.append(...rows);
      for (const h of $$('th[data-sort]', table)) h.ariaSort = h.dataset.sort === k ? (down > 0 ? 'ascending' : 'descending') : 'none';
    };
    for (const h of $$('th[data-sort]', table)) { h.tabIndex = 0; h.onclick = () => sort(h.dataset.sort); h.onkeydown = e => { if (e.key === 'Enter') sort(h.dataset.sort) } }
    for (const p of picks) { const v = asked.get(p.dataset.filter); if (v && [...p.options].some(o => o.value === v)) p.value = v; p.oninput = show }
    input.value = asked.get('q') || ''; input.oninput = show; show();
  }
  addEventListener('DOMContentLoaded', () => { // the field map: what a link asks for
    for (const [id, key] of [['q', 'q'], ['type', 'type'], ['out', 'outcome'], ['sort', 'sort']]) {
      const e = $('#' + id); if (!e || !asked.get(key)) continue;
      e.value = asked.get(key); e.dispatchEvent(new Event(id === 'sort' ? 'change' : 'input'));
    }
    const rows = $$('#q ~ *, tbody tr').length && $('#q') ? $$('tbody tr').filter(r => !r.hidden) : [];
    if (asked.get('q') && rows.length === 1) { const d = $('details', rows[0]); if (d) d.open = true }
  });
})();
