// The live page. It reads the events `past`, `now` and `end` of /events; their shapes are Past, Now and
// JobSnapshot of the scheduler. A field that has its default may be missing.

import { Charts } from "/assets/charts.js";
import { bars, clock, duration, fill, get, hardware, learn, loss, make, n, number, peer, put } from "/assets/text.js";
import { legend, timeline } from "/assets/timeline.js";

const MAX_ROUNDS_SHOWN = 100;
const MAX_FAULTS_SHOWN = 8;
const RETRY_MS = 5000;

const rounds = new Map();
let open = null;
let job = null;
let roundsChanged = true;
let warned = -1;

const charts = new Charts({
  loss: get("loss"),
  lossLegend: get("loss-legend"),
  rate: get("rate"),
  rateLegend: get("rate-legend"),
});
legend(get("timeline-legend"));

// --- receiving ------------------------------------------------------------------------------------------

const key = (record) => record.generation * 1e9 + record.round;
const counts = (record) => record.applied && !record.discarded;
const inOrder = () => [...rounds.values()].sort((one, other) => key(one) - key(other));

function past(message) {
  rounds.clear();
  for (const record of message.rounds) keep(record);
  roundsChanged = true;
}

function keep(record) {
  rounds.set(key(record), record);
  for (const [id, name] of Object.entries(record.names || {})) learn(id, name);
}

function learnNames() {
  learn(job.scheduler, job.scheduler_name);
  learn(job.parameter_server, job.parameter_server_name);
  for (const one of [...job.workers, ...job.held, ...job.connections, ...job.warnings]) learn(one.peer, one.name);
}

function now(message) {
  job = message.job;
  open = message.open;
  learnNames();
  for (const record of message.rounds) {
    keep(record);
    roundsChanged = true;
  }
  render();
}

let lastHeard = 0;

function link(state, text) {
  get("link").dataset.link = state;
  put(get("link"), text);
}

function listen() {
  const events = new EventSource(`/events${location.search}`);
  events.addEventListener("past", (event) => past(JSON.parse(event.data)));
  events.addEventListener("now", (event) => {
    lastHeard = Date.now() / 1000;
    link("live", "live");
    now(JSON.parse(event.data));
  });
  events.addEventListener("end", () => {
    events.close();
    link("ended", `ended ${clock(Date.now() / 1000)}`);
    if (job && job.state !== "done") setTimeout(listen, RETRY_MS);
  });
  events.addEventListener("error", async () => {
    const since = lastHeard ? ` since ${clock(lastHeard)}` : "";
    link("lost", `no answer${since}`);
    // a browser tries again by itself unless it was refused
    if (events.readyState !== EventSource.CLOSED) return;
    const refused = await fetch(`/status${location.search}`).then((answer) => answer.status, () => 0);
    if (refused === 401) link("lost", "not let in: the address lacks its token");
    else if (refused === 403) link("lost", "not let in: use 127.0.0.1 or localhost");
    else if (refused === 200) link("lost", "too many viewers; trying again");
    setTimeout(listen, RETRY_MS);
  });
}

// --- showing --------------------------------------------------------------------------------------------

function render() {
  put(get("name"), job.name);
  document.title = `${job.name}: ${job.state}, round ${job.round}/${job.rounds}`;
  put(get("state"), job.state);
  get("state").dataset.state = job.state;
  put(get("message"), job.message);
  get("message").dataset.state = job.state;
  get("progress").max = Math.max(job.rounds, 1);
  get("progress").value = job.round;
  put(get("progress-label"), `Round ${job.round} of ${job.rounds}`);
  figures();
  if (roundsChanged) {
    const ordered = inOrder();
    charts.draw(ordered.filter(counts));
    roundTable(ordered);
    roundsChanged = false;
  }
  drawTimeline();
  workers();
  leases();
  slices();
  goodput();
  topology();
  warnings();
}

function figures() {
  const rows = [
    ["Loss", loss(job.loss), "loss"],
    ["Samples/s", number(job.samples_per_s), "samples_per_s"],
    ["Samples", number(job.samples), "samples"],
    ["Workers", number(job.workers.length), "workers"],
    ["Leases", number(job.leases), "leases"],
    ["Epoch", number(job.epoch + 1), "epoch"],
    ["Data nodes", number(job.providers), "providers"],
    ["Checkpoint of round", job.checkpoint === null ? "–" : number(job.checkpoint), "checkpoint"],
    ["Running for", duration(job.elapsed_s), "elapsed"],
  ];
  const share = goodputShare();
  if (share !== null) rows.splice(2, 0, ["Goodput", `${number(share * 100, 1)} %`, "goodput"]);
  const box = get("figures");
  rows.forEach(([name, value, id], index) => {
    if (!box.children[index]) {
      const pair = make("div");
      pair.append(make("dt"), make("dd"));
      box.append(pair);
    }
    put(box.children[index].firstElementChild, name);
    put(box.children[index].lastElementChild, value);
    box.children[index].lastElementChild.dataset.figure = id;
  });
  while (box.children.length > rows.length) box.lastElementChild.remove();
}

function drawTimeline() {
  const count = Number(get("timeline-rounds").value);
  const records = open ? [...inOrder(), open] : inOrder();
  timeline(get("timeline"), get("timeline-detail"), records.slice(-count));
  const faults = records
    .slice(-50)
    .flatMap((record) => (record.faults || []).map((fault) => [record, fault]))
    .slice(-MAX_FAULTS_SHOWN)
    .reverse();
  const lines = faults.map(([record, [at, id, what, text]]) => [
    clock(record.began + at),
    "error",
    what,
    `round ${record.round + 1}, ${peer(id)}: ${text}`,
  ]);
  list(get("faults"), lines, "None in the last rounds.");
}

function list(box, lines, nothing) {
  const wanted = lines.length ? lines : [["", "", "", nothing]];
  const text = JSON.stringify(wanted);
  if (box.dataset.shown === text) return;
  box.dataset.shown = text;
  box.replaceChildren(
    ...wanted.map(([when, level, word, words]) => {
      const line = make("li");
      if (when) line.append(make("span", "when", when));
      if (word) line.append(make("span", level, word));
      line.append(make("span", "", words));
      return line;
    }),
  );
}

const mono = (text, title = "") => ({ text, className: "mono", title });

function workers() {
  const rows = job.workers.map((worker) => [
    mono(peer(worker.peer), worker.peer),
    worker.version || "not stated",
    worker.state,
    {
      text: `${worker.batches} of ${worker.planned ?? "?"}`,
      part: [worker.batches, worker.planned ?? Math.max(worker.batches * 2, 1)],
    },
    n(number(worker.batch_size)),
    n(number(worker.samples_per_s)),
    n(worker.idle_share === null || worker.idle_share === undefined ? "–" : `${(100 * worker.idle_share).toFixed(1)} %`),
    n(number(worker.samples)),
    n(loss(worker.loss)),
  ]);
  fill(get("workers"), rows, "No worker takes part yet.", 9);
}

function ends(lease) {
  if (lease.leaves_in_s !== null && lease.leaves_in_s !== undefined) {
    return { text: `${duration(lease.leaves_in_s)}, its worker leaves`, className: "n bad" };
  }
  const left = duration(lease.expires_in_s);
  return lease.suspected ? { text: `${left}, unreachable`, className: "n bad" } : n(left);
}

function leases() {
  const rows = job.held.map((lease) => [
    mono(peer(lease.peer), lease.peer),
    lease.kind === "aggregate" ? "parameter server" : "training",
    n(String(lease.price)),
    hardware(lease),
    ends(lease),
    mono(lease.lease.slice(0, 8), lease.lease),
  ]);
  fill(get("leases"), rows, "No lease is held yet.", 6);
}

function slices() {
  const known = job.slices;
  put(
    get("slices-about"),
    known ? `${job.dataset}: ${number(job.dataset_samples)} samples, epoch ${job.epoch + 1}` : "Nothing is known of the dataset yet.",
  );
  if (!known) return;
  const whole = known.available + known.assigned + known.used;
  const row = (name, count) => [name, count, number(count)];
  bars(get("slices"), [row("available", known.available), row("with workers", known.assigned), row("used", known.used)], whole);
}

function goodputShare() {
  const report = job.goodput;
  return report && report.places > 0 && report.wall_s > 0 ? report.goodput_s / (report.wall_s * report.places) : null;
}

function goodput() {
  const report = job.goodput;
  get("goodput-section").hidden = !report;
  if (!report) return;
  const whole = report.wall_s * report.places;
  const share = goodputShare();
  put(
    get("goodput-about"),
    `${number((share ?? 0) * 100, 1)} % of ${duration(whole)} (all places together) went into samples that count.`,
  );
  const rows = [
    ["goodput", report.goodput_s, false],
    ...Object.entries(report.badput_s)
      .sort((one, other) => other[1] - one[1])
      .map(([reason, seconds]) => [reason, seconds, true]),
  ].map(([name, seconds, lost]) => [name.replaceAll("-", " "), seconds, duration(seconds), lost]);
  bars(get("goodput"), rows, whole);
}

function topology() {
  const rows = job.connections.map((one) => [
    mono(peer(one.peer), one.peer),
    roleOf(one),
    one.kind === "relayed" ? { text: "relayed", className: "" } : one.kind,
    n(one.round_trip_s === null ? "–" : duration(one.round_trip_s)),
    one.direction === "outbound" ? "scheduler" : "peer",
    mono(one.address),
  ]);
  fill(get("topology"), rows, "The scheduler has no connection.", 6);
}

function roleOf(one) {
  const role = one.roles.join(", ") || "any";
  return one.peer === job.parameter_server ? `${role}, parameter server` : role;
}

function warnings() {
  const last = job.warnings.at(-1)?.number ?? 0;
  if (last === warned) return;
  warned = last;
  const lines = [...job.warnings].reverse().map((line) => [
    clock(line.at),
    line.level,
    line.level,
    line.peer ? `${line.message} (${peer(line.peer)})` : line.message,
  ]);
  list(get("warnings"), lines, "None.");
}

function roundTable(ordered) {
  const rows = ordered
    .slice(-MAX_ROUNDS_SHOWN)
    .reverse()
    .map((record) => {
      const outcome = record.discarded ? "done again" : record.applied ? "applied" : "cut short";
      const faults = (record.faults || []).length;
      return [
        n(number(record.round + 1)),
        record.applied && !record.discarded ? outcome : { text: outcome, className: "bad" },
        n(loss(record.loss)),
        n(number(record.samples || 0)),
        n(record.duration_s ? number((record.samples || 0) / record.duration_s) : "–"),
        n(duration(record.duration_s || record.length_s)),
        n(number((record.workers || []).filter((worker) => worker.counted).length)),
        n(number(record.update_norm || 0, 3)),
        faults ? { text: String(faults), className: "n bad" } : n("0"),
      ];
    });
  fill(get("rounds"), rows, "No round has ended yet.", 9);
}

// --- theme ----------------------------------------------------------------------------------------------

const THEMES = ["auto", "dark", "light"];

function stored() {
  try {
    return localStorage.getItem("theme");
  } catch {
    return null;
  }
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  put(get("theme"), `Theme: ${theme}`);
  charts.rebuild();
}

let theme = THEMES.includes(stored()) ? stored() : "auto";
setTheme(theme);
get("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // it is only forgotten
  }
  setTheme(theme);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.rebuild());
if (innerWidth < 480) get("timeline-rounds").value = "2";
get("timeline-rounds").addEventListener("change", () => job && drawTimeline());
new ResizeObserver(() => job && drawTimeline()).observe(get("timeline"));

listen();
