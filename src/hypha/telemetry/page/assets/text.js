// Numbers and names in words, and the smallest pieces of the page. Whatever a peer said goes through
// textContent alone.

// What certificates say, by PeerID; a name once known stays known.
const names = new Map();

export function learn(id, name) {
  if (id && name) names.set(id, name);
}

export function peer(id) {
  if (!id) return "–";
  const end = `…${id.slice(-8)}`;
  return names.has(id) ? `${names.get(id)} (${end})` : end;
}

export const number = (value, digits = 0) =>
  value === null || value === undefined || !Number.isFinite(value)
    ? "–"
    : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

export const loss = (value) => number(value, 4);

export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");

// Of a lease or an offer; `shown` writes one amount.
export function hardware(amounts, shown = String) {
  const parts = [
    [amounts.cpu, amounts.cpu === 1 ? "core" : "cores"],
    [amounts.memory, "GB memory"],
    [amounts.gpu, "GB GPU"],
    [amounts.storage, "GB storage"],
  ];
  return parts.filter(([amount]) => amount).map(([amount, unit]) => `${shown(amount)} ${unit}`).join(", ") || "–";
}

export const get = (id) => document.getElementById(id);

// A cell of numbers.
export const n = (text) => ({ text, className: "n" });

export function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function make(name, className = "", text = "") {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

// Rows are reused, so that neither focus nor a selection is lost when numbers change. A cell is a text, or
// {text, className, part: [value, max]} with a bar before the text.
export function fill(body, rows, nothing, columns) {
  const list = rows.length ? rows : [[{ text: nothing, className: "empty", span: columns }]];
  while (body.rows.length > list.length) body.deleteRow(-1);
  list.forEach((cells, index) => {
    const row = body.rows[index] || body.insertRow();
    while (row.cells.length > cells.length) row.deleteCell(-1);
    cells.forEach((cell, column) => {
      const box = row.cells[column] || row.insertCell();
      const { text, className = "", part = null, span = 1, title = "" } = typeof cell === "string" ? { text: cell } : cell;
      if (box.className !== className) box.className = className;
      if (box.colSpan !== span) box.colSpan = span;
      if (box.title !== title) box.title = title;
      if (!part) {
        if (box.firstElementChild) box.replaceChildren();
        put(box, text);
        return;
      }
      let bar = box.querySelector("progress");
      if (!bar) {
        bar = make("progress");
        box.replaceChildren(bar, make("span"));
      }
      bar.max = Math.max(part[1], 1);
      bar.value = Math.min(part[0], bar.max);
      bar.setAttribute("aria-label", text);
      put(box.lastElementChild, text);
    });
  });
}

// Bars: name, amount of the whole, what it is in words, and whether less of it would be better.
export function bars(box, rows, whole) {
  while (box.children.length > rows.length * 3) box.lastElementChild.remove();
  rows.forEach(([name, amount, text, lost = false], index) => {
    if (!box.children[index * 3]) box.append(make("span"), make("meter"), make("span"));
    const [label, meter, words] = [0, 1, 2].map((offset) => box.children[index * 3 + offset]);
    put(label, name);
    meter.min = 0;
    meter.max = whole || 1;
    // browsers give another colour to what is far from the optimum
    meter.low = lost ? meter.max * 1e-6 : 0;
    meter.high = meter.max;
    meter.optimum = lost ? 0 : meter.max;
    meter.value = amount;
    meter.setAttribute("aria-label", `${name}: ${text}`);
    put(words, text);
  });
}
