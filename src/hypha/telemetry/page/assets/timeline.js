// What everybody did in the last rounds, one row a node, one colour a kind of work.

import { duration, make, peer, put } from "/assets/text.js";

const SVG = "http://www.w3.org/2000/svg";
const [ROW, GAP, TOP, LABELS] = [20, 6, 20, 84];
const MAX_ROWS = 24;
const LABEL_LETTERS = 12;
export const KINDS = {
  loading: "loading the model",
  waiting: "waiting",
  training: "training",
  sending: "sending the update",
  collecting: "collecting updates",
  "outer-step": "outer step",
  broadcast: "sending theta",
};

function draw(name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  return element;
}

export function legend(list) {
  const kinds = Object.entries(KINDS).filter(([kind]) => kind !== "collecting");
  const item = (className, text) => {
    const one = make("li");
    one.append(make("span", `key ${className}`), make("span", "", text));
    return one;
  };
  list.replaceChildren(
    ...kinds.map(([kind, text]) => item(kind, kind === "waiting" ? "waiting, collecting" : text)),
    item("faulty", "fault"),
  );
}

// `records`: those to show, in order, the open one at the end; each may lack what is empty.
export function timeline(box, detail, records) {
  const shown = records.filter((record) => record.began && record.length_s);
  const width = box.clientWidth;
  if (!shown.length || !width) return;
  const from = Math.min(...shown.map((record) => record.began));
  const until = Math.max(...shown.map((record) => record.began + record.length_s));
  const scale = (width - LABELS - 4) / Math.max(until - from, 0.001);
  const x = (record, seconds) => LABELS + (record.began - from + seconds) * scale;
  const ids = [...new Set(shown.flatMap((record) => (record.workers || []).map((worker) => worker.peer)))].sort();
  const rows = ids.slice(0, MAX_ROWS);
  const hidden = ids.length - rows.length;
  const height = TOP + (rows.length + 1) * (ROW + GAP) + (hidden ? 16 : 0) + 4;
  const y = (index) => TOP + index * (ROW + GAP);
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });

  ["server", ...rows.map(peer)].forEach((name, index) => {
    // the whole of it is in the text of each span
    svg.append(draw("text", { x: 0, y: y(index) + 14 }, name.length > LABEL_LETTERS ? `${name.slice(0, LABEL_LETTERS - 1)}…` : name));
    svg.append(draw("rect", { x: LABELS, y: y(index), width: width - LABELS - 4, height: ROW, class: "track" }));
  });
  let labelled = -Infinity;
  for (const record of shown) {
    const edge = x(record, 0);
    svg.append(draw("line", { x1: edge, x2: edge, y1: TOP - 6, y2: height - 4, class: "edge" }));
    if (edge - labelled > 58 && width - edge > 52) {
      svg.append(draw("text", { x: edge + 3, y: 11, class: "axis" }, `round ${record.round + 1}`));
      labelled = edge;
    }
  }
  const spans = (record, list, index, who) => {
    for (const [kind, start, end] of list || []) {
      const text = `Round ${record.round + 1}, ${who}: ${KINDS[kind] || kind}, ${duration(end - start)}`;
      const wide = Math.max((end - start) * scale, 1);
      svg.append(
        draw("rect", { x: x(record, start), y: y(index), width: wide, height: ROW, class: kind, "data-text": text }),
      );
    }
  };
  for (const record of shown) {
    spans(record, record.server_spans, 0, `parameter server on ${peer(record.server)}`);
    for (const worker of record.workers || []) {
      const index = rows.indexOf(worker.peer);
      if (index >= 0) spans(record, worker.spans, index + 1, peer(worker.peer));
    }
  }
  for (const record of shown) {
    for (const [at, id, what, words] of record.faults || []) {
      const row = Math.max(rows.indexOf(id) + 1, 0);
      const [cx, cy] = [x(record, at), y(row) + ROW / 2];
      const points = `${cx},${cy - 8} ${cx + 7},${cy} ${cx},${cy + 8} ${cx - 7},${cy}`;
      const text = `Round ${record.round + 1}, ${peer(id)}: ${what}: ${words}`;
      svg.append(draw("polygon", { points, class: "fault", "data-text": text }));
    }
  }
  if (hidden) svg.append(draw("text", { x: 0, y: height - 5, class: "axis" }, `and ${hidden} more workers`));
  box.replaceChildren(svg);
  box.onpointermove = (event) => {
    if (event.target.dataset && event.target.dataset.text) put(detail, event.target.dataset.text);
  };
  const last = shown.at(-1);
  box.setAttribute(
    "aria-label",
    `Time line of the last ${shown.length} rounds over ${duration(until - from)}, up to round ${last.round + 1}, for ${rows.length} workers and the parameter server`,
  );
}
