// Keeps what is shown fresh, and says so when it is not. Everything on the page works without it.
"use strict";

const EVERY = 10_000;
const stale = document.getElementById("stale");
let shownAt = Date.now();
let asked = 0;
let shown = 0;

async function refresh() {
  const mine = ++asked;
  const address = new URL(location.href);
  address.searchParams.delete("done");
  const answer = await fetch(address, { cache: "no-store", signal: AbortSignal.timeout(EVERY) });
  if (answer.status === 401) {
    location.reload();
    return;
  }
  if (!answer.ok) throw new Error(answer.status);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  if (mine < shown) return; // one that was asked later was faster
  shown = mine;
  for (const part of document.querySelectorAll("[data-live]")) {
    const next = fresh.getElementById(part.id);
    if (next && next.innerHTML !== part.innerHTML) replace(part, next);
  }
  document.title = fresh.title;
  shownAt = Date.now();
  stale.hidden = true;
}

// What somebody is about to use stays where it is.
function replace(part, next) {
  const inside = part.contains(document.activeElement) ? document.activeElement : null;
  const link = inside?.getAttribute("href");
  if ((inside && !link) || (!getSelection().isCollapsed && part.contains(getSelection().anchorNode))) return;
  const open = [...part.querySelectorAll("details")].map((one) => one.open);
  part.replaceChildren(...next.childNodes);
  part.querySelectorAll("details").forEach((one, i) => (one.open = open[i] ?? one.open));
  if (link) part.querySelector(`a[href="${CSS.escape(link)}"]`)?.focus({ preventScroll: true });
}

async function look() {
  try {
    await refresh();
  } catch {
    const minutes = Math.floor((Date.now() - shownAt) / 60_000);
    stale.textContent = `The server does not answer: this is ${minutes ? `${minutes} min` : "some seconds"} old.`;
    stale.hidden = false;
  }
}

async function again() {
  if (!document.hidden) await look();
  setTimeout(again, EVERY);
}

if (stale) {
  // A message about what was done is for now, not for whoever loads the page again.
  const address = new URL(location.href);
  if (address.searchParams.has("done") || address.searchParams.has("again")) {
    address.searchParams.delete("done");
    address.searchParams.delete("again");
    history.replaceState(null, "", address);
  }
  document.addEventListener("visibilitychange", () => document.hidden || look());
  setTimeout(again, EVERY);
}
