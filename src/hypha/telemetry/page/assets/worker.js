// The page of a worker. It asks for /leases (GivenLeases of the worker) and /health every two seconds. Leases are
// told on this machine alone; elsewhere the page shows the health.

import { bars, duration, fill, get, hardware, learn, n, number, peer, put } from "/assets/text.js";

const EVERY_MS = 2000;
const PATIENCE_MS = 10000;

const rounded = (value) => number(value, value % 1 ? 2 : 0);
const amount = (value) => String(Number(value.toPrecision(6)));

function showPrice(price) {
  const most = Math.max(price.asked, price.rest, price.floor);
  put(get("price-about"), `It asks for ${amount(price.asked)} a lease (${price.strategy}).`);
  get("price").hidden = false;
  bars(get("price"), [
    ["asked now", most ? price.asked / most : 0, amount(price.asked)],
    ["at rest", most ? price.rest / most : 0, amount(price.rest)],
    ["floor", most ? price.floor / most : 0, amount(price.floor)],
    ["load", price.load, `${Math.round(price.load * 100)} %`],
  ], 1);
}

function showLeases(given) {
  learn(given.worker, given.name);
  if (given.worker) put(get("name"), peer(given.worker));
  put(get("state"), given.state);
  if (given.price) showPrice(given.price);
  const rows = given.leases.map((lease) => {
    learn(lease.scheduler, lease.name);
    return [
      { text: peer(lease.scheduler), className: "mono", title: lease.scheduler },
      lease.kind === "aggregate" ? "parameter server" : "training",
      lease.job ? `${lease.state}: ${lease.job}` : lease.state,
      n(amount(lease.price)),
      hardware(lease.resources, rounded),
      n(duration(lease.expires_in_s)),
      { text: lease.lease.slice(0, 8), className: "mono", title: lease.lease },
    ];
  });
  fill(get("leases"), rows, "Nothing is leased.", 7);
  put(get("free"), `Free: ${hardware(given.free, rounded)}`);
}

function showHealth(report) {
  const rows = Object.entries(report.details || {}).sort().map(([name, value]) => [name, value]);
  fill(get("health"), rows, "Nothing is said.", 2);
}

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  // an unhealthy node answers with 503, and says why
  if (!answer.ok && answer.status !== 503) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

async function look() {
  try {
    showHealth(await ask("/health"));
    put(get("link"), "live");
  } catch {
    put(get("link"), "the worker does not answer");
    return;
  }
  try {
    showLeases(await ask("/leases"));
  } catch {
    put(get("state"), "running");
    put(get("price-about"), "Prices and leases are told on the worker's own machine alone.");
    get("price").hidden = true;
  }
}

look();
setInterval(look, EVERY_MS);
