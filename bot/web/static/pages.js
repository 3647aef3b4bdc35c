"use strict";
// Keeps a page as it would be after a reload: fetches its parts and puts in those that changed. Without it the pages are complete.
(() => {
  const main = document.getElementById("main");
  if (!main || !main.dataset.live) return;
  const page = document.documentElement;
  const received = new Map();
  let busy = false;
  let again = false;
  let over = false;

  const atEnd = () => window.innerHeight + window.scrollY >= document.body.scrollHeight - 120;

  function keep(old, part) {
    for (const open of old.querySelectorAll("details[id]")) {
      const same = part.querySelector(`#${CSS.escape(open.id)}`);
      if (same) same.open = open.open;
    }
    const focused = old.contains(document.activeElement) ? document.activeElement.closest("[id]") : null;
    old.replaceWith(part);
    const place = focused && document.getElementById(focused.id);
    if (place) (place.querySelector("summary") || place).focus({ preventScroll: true });
  }

  function merge(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    const following = main.dataset.follow && atEnd();
    for (const part of [...fresh.querySelectorAll("[data-part]")]) {
      const source = part.outerHTML;
      const old = document.getElementById(part.id);
      if (old && received.get(part.id) !== source) keep(old, document.adoptNode(part));
      else if (!old && main.dataset.follow) document.getElementById(part.dataset.part)?.append(document.adoptNode(part));
      received.set(part.id, source);
    }
    if (document.querySelector("#steps > *")) document.getElementById("no-steps")?.remove();
    if (document.getElementById("head")?.dataset.over) over = true;
    if (following) window.scrollTo(0, document.body.scrollHeight);
    page.dataset.live = over ? "over" : "on";
  }

  async function refresh() {
    if (busy) {
      again = true;
      return;
    }
    busy = true;
    try {
      const address = new URL(main.dataset.live, location.href);
      const from = document.getElementById("head")?.dataset.from;
      if (from) address.searchParams.set("from", from);
      const reply = await fetch(address, { cache: "no-store", credentials: "same-origin" });
      if (reply.ok) merge(await reply.text());
      else if (reply.status === 404) over = true;
    } catch {
      page.dataset.live = "off";
    }
    busy = false;
    if (again) {
      again = false;
      setTimeout(refresh, 500);
    }
  }

  function poll(every) {
    setTimeout(async () => {
      if (!document.hidden) await refresh();
      if (!over) poll(every);
    }, every);
  }

  if (!main.dataset.events || !window.EventSource) {
    poll(Number(main.dataset.every) || 5000);
    return;
  }
  const events = new EventSource(main.dataset.events);
  events.addEventListener("changed", refresh);
  events.addEventListener("over", () => {
    events.close();
    refresh();
  });
  events.addEventListener("error", () => {
    page.dataset.live = "off";
    if (events.readyState === EventSource.CLOSED && !over) poll(10000);
  });
})();
