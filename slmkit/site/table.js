// Tables of the class `find` can be searched, filtered by columns that say data-filter, and sorted by any column.
const make = (tag, attributes, text = "") => Object.assign(document.createElement(tag), attributes, { textContent: text });

function equip(table) {
  const rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows[0].cells];
  const words = new Map(rows.map(r => [r, r.textContent.toLowerCase()]));
  const cell = (row, i) => (row.cells[i].querySelector(".outcome") || row.cells[i]).textContent.trim();
  const bar = make("div", { className: "bar" }), count = make("span", { ariaLive: "polite" });
  const box = make("input", { type: "search", placeholder: `Search ${rows.length} rows`, ariaLabel: "Search the table" });
  const picks = heads.flatMap((h, i) => h.dataset.filter === undefined ? [] : [[i, pick(h, i)]]);

  function pick(head, i) {
    const select = make("select", { ariaLabel: head.textContent });
    select.append(make("option", { value: "" }, `${head.textContent}: all`));
    for (const v of [...new Set(rows.map(r => cell(r, i)))].sort()) select.append(make("option", { value: v }, v));
    return select;
  }
  function show() {
    const asked = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    for (const r of rows) {
      r.hidden = !(asked.every(w => words.get(r).includes(w)) && picks.every(([i, s]) => !s.value || cell(r, i) === s.value));
      n += !r.hidden;
    }
    count.textContent = `${n} of ${rows.length}`;
  }
  function sort(head, i) {
    const down = head.ariaSort === "ascending";
    heads.forEach(h => h.ariaSort = "none");
    head.ariaSort = down ? "descending" : "ascending";
    rows.sort((a, b) => (down ? -1 : 1) * cell(a, i).localeCompare(cell(b, i), "en", { numeric: true }));
    table.tBodies[0].append(...rows);
  }
  heads.forEach((h, i) => {
    const button = make("button", { type: "button", onclick: () => sort(h, i) }, h.textContent);
    h.replaceChildren(button);
  });
  for (const x of [box, ...picks.map(p => p[1])]) { x.oninput = show; bar.append(x); }
  bar.append(count);
  (table.closest(".table-wrapper") || table).before(bar);
  box.value = new URLSearchParams(location.search).get("q") || "";
  show();
}
document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("table.find").forEach(equip));

// One switch hides all code of a page, and is remembered: for who reads words, tables and pictures only.
function codeSwitch() {
  if (document.querySelectorAll("article div.cell_input").length < 3) return;
  const button = make("button", { type: "button", className: "code-switch" });
  const set = hidden => {
    document.body.classList.toggle("no-code", hidden);
    button.textContent = hidden ? "Show code" : "Hide code";
    button.ariaPressed = hidden;
    try { localStorage.setItem("slmkit-code", hidden ? "hidden" : ""); } catch { /* a page from disk may have no storage */ }
  };
  let kept = "";
  try { kept = localStorage.getItem("slmkit-code"); } catch { /* the same */ }
  button.onclick = () => set(!document.body.classList.contains("no-code"));
  set(kept === "hidden");
  document.querySelector("article h1")?.after(button);
}
document.addEventListener("DOMContentLoaded", codeSwitch);
