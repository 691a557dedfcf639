// Loss and samples a second by round, drawn by uPlot. The same numbers are in the table of rounds.

import { loss, make, number, peer, put } from "/assets/text.js";

const HEIGHT = 220;
const COLOURS = 8;
//: more lines than colours cannot be told apart
const MAX_LINES = COLOURS;

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function axis(extra) {
  const grid = { stroke: style("--grid"), width: 1 };
  return { stroke: style("--soft"), grid, ticks: grid, font: "12px system-ui, sans-serif", ...extra };
}

const wholeNumbers = (_, splits) => splits.map((value) => (Number.isInteger(value) ? String(value) : ""));

class Chart {
  constructor(box, legend) {
    this.box = box;
    this.legend = legend;
    this.names = null;
    this.hidden = new Set();
    new ResizeObserver(() => this.resize()).observe(box);
  }

  resize() {
    const width = this.box.clientWidth;
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  // Theme or lines have changed.
  rebuild() {
    this.names = null;
    if (this.last) this.draw(...this.last);
  }

  draw(data, lines, yLabel, format) {
    this.last = [data, lines, yLabel, format];
    const names = lines.map((line) => line.name).join("|");
    if (names !== this.names) {
      this.names = names;
      if (this.plot) this.plot.destroy();
      this.plot = new uPlot(this.options(lines, format), data, this.box);
      this.makeLegend(lines);
    } else {
      this.plot.setData(data);
    }
    lines.forEach((line, index) => put(this.legend.children[index].querySelector("span:last-child"), line.text));
  }

  options(lines, format) {
    const series = lines.map((line) => ({
      label: line.name,
      stroke: style(line.colour),
      width: line.width,
      show: !this.hidden.has(line.name),
      spanGaps: false,
      points: { show: (plot) => plot.data[0].length < 30, size: line.width * 2 + 3, fill: style(line.colour) },
    }));
    return {
      width: this.box.clientWidth || 300,
      height: HEIGHT,
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false } },
      scales: { x: { time: false, range: (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) } },
      axes: [axis({ values: wholeNumbers }), axis({ size: 62, values: (_, splits) => splits.map(format) })],
      series: [{}, ...series],
    };
  }

  makeLegend(lines) {
    this.legend.replaceChildren(
      ...lines.map((line, index) => {
        const button = make("button");
        button.type = "button";
        button.title = "Show or hide this line";
        button.setAttribute("aria-pressed", String(!this.hidden.has(line.name)));
        const key = make("span", "key");
        key.style.background = style(line.colour);
        button.append(key, make("span"));
        button.addEventListener("click", () => {
          const hide = !this.hidden.has(line.name);
          if (hide) this.hidden.add(line.name);
          else this.hidden.delete(line.name);
          button.setAttribute("aria-pressed", String(!hide));
          this.plot.setSeries(index + 1, { show: !hide });
        });
        const item = make("li");
        item.append(button);
        return item;
      }),
    );
  }
}

export class Charts {
  constructor(page) {
    this.lossBox = page.loss;
    this.rateBox = page.rate;
    this.loss = new Chart(page.loss, page.lossLegend);
    this.rate = new Chart(page.rate, page.rateLegend);
  }

  rebuild() {
    this.loss.rebuild();
    this.rate.rebuild();
  }

  // `rounds`: applied ones that count, in order.
  draw(rounds) {
    if (!rounds.length) return;
    const numbers = rounds.map((round) => round.round + 1);
    const peers = [...new Set(rounds.flatMap((round) => (round.workers || []).map((worker) => worker.peer)))].sort();
    const shown = peers.slice(0, MAX_LINES - 1);
    const byPeer = shown.map((id) =>
      rounds.map((round) => {
        const found = (round.workers || []).find((worker) => worker.peer === id);
        return found && found.counted ? (found.loss ?? null) : null;
      }),
    );
    const mean = rounds.map((round) => round.loss ?? null);
    const last = rounds.at(-1);
    // the mean is drawn over the others
    const lines = [
      ...shown.map((id, index) => ({
        name: id,
        colour: `--c${index + 1}`,
        width: 1.5,
        text: `${peer(id)} ${loss(byPeer[index].at(-1))}`,
      })),
      { name: "mean", colour: "--c0", width: 3, text: `mean ${loss(last.loss)}` },
    ];
    this.loss.draw([numbers, ...byPeer, mean], lines, "loss", (value) => number(value, 2));
    this.lossBox.setAttribute(
      "aria-label",
      `Loss by round: ${rounds.length} rounds, from ${loss(rounds[0].loss)} to ${loss(last.loss)}; ${peers.length} workers`,
    );
    const rates = rounds.map((round) => (round.duration_s ? (round.samples || 0) / round.duration_s : null));
    const line = { name: "rate", colour: "--c2", width: 2, text: `last round ${number(rates.at(-1))} samples/s` };
    this.rate.draw([numbers, rates], [line], "samples/s", (value) => number(value));
    this.rateBox.setAttribute("aria-label", `Samples a second by round: last ${number(rates.at(-1))}`);
  }
}
