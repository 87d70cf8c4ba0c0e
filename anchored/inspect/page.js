// The page of `anchored inspect`: a list that holds only the rows in sight, one pair, and decisions about it.
// All data comes from the server that sent this file, as JSON, and reaches the page as text only (see pair.js).
"use strict";

const ROW = 60; // pixels, as in page.css
const EXTRA = 12; // rows drawn beyond each edge of what is in sight
const STRETCH = 100; // rows asked for at a time
const STRETCHES = 60; // stretches remembered
const AT_ONCE = 3; // stretches asked for at the same time
const TALLEST = 8_000_000; // pixels of a list: browsers draw none that is much taller
const PAUSE = 150; // milliseconds without a key after which the search begins
const NAMES = { keep: "kept", drop: "dropped", edit: "edited", undo: "undone" };

const [title, progress, show, decision, method, order, search, count, list, space, article, note, place, message, help] =
  ["title", "progress", "show", "decision", "method", "order", "search", "count", "list", "space", "pair", "note", "place",
    "message", "help"].map((id) => document.getElementById(id));
const buttons = Object.fromEntries(["back", "previous", "next", "keep", "drop", "edit", "undo", "merge", "help-button"]
  .map((id) => [id, document.getElementById(id)]));

let view = { view: "", total: 0 };
let stretches = new Map(); // number -> entries, or null while they are on their way
let at = 0; // place in the view
let current = null; // the pair that is shown, nothing while another one is on its way
let saving = false;
let editing = null; // { row, fields } while answers are edited
let lastDecided = null; // { row, at, view }

// ---- the server ----

async function ask(path, query = {}, signal = undefined) {
  return answer(fetch(`${path}?${new URLSearchParams(query)}`, { headers: { "X-Anchored-Token": token() }, signal }));
}

async function tell(path, body) {
  const headers = { "X-Anchored-Token": token(), "Content-Type": "application/json" };
  return answer(fetch(path, { method: "POST", headers, body: JSON.stringify(body) }));
}

async function answer(response) {
  let said;
  try {
    said = await response;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server has ended: start `anchored inspect` again and open the address it prints.");
  }
  const value = await said.json();
  if (!said.ok) throw new Error(value.error);
  return value;
}

function token() {
  return location.hash.slice(1);
}

let sayingEnds;

function say(text, isError = false) {
  clearTimeout(sayingEnds);
  message.textContent = text;
  message.className = isError ? "error" : "";
  if (!isError) sayingEnds = setTimeout(() => { message.textContent = ""; }, 4000);
}

/** Run something of this page; what goes wrong is told. */
async function attempt(work) {
  try {
    await work();
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  }
}

// ---- what is asked for ----

let looking = new AbortController();

/** Ask anew, as the controls say, and go to the first row. */
async function look() {
  if (!mayLeave()) return;
  looking.abort();
  looking = new AbortController();
  const { signal } = looking;
  count.textContent = "looking …";
  article.setAttribute("aria-busy", "true");
  const query = {
    show: show.value, decision: decision.value, method: method.value, order: order.value, search: search.value,
  };
  const found = await ask("api/view", query, signal);
  if (signal.aborted) return;
  view = found;
  stretches = new Map();
  list.scrollTop = 0;
  space.replaceChildren();
  offer(show, found.shows);
  offer(decision, [["", "any", null], ...found.decisions.map(([name, label, rows]) => [name, NAMES[name] ?? label, rows])]);
  const methods = found.methods.filter(([name]) => name);
  offer(method, [["", "any", null], ...methods]);
  document.getElementById("method-label").hidden = methods.length < 2;
  tellProgress(found.decided);
  const rows = found.total.toLocaleString("en");
  count.textContent = `${rows} ${found.total === 1 ? "row" : "rows"}`;
  drawList();
  await go(0);
}

/** The choices of a filter, each with how many rows it would leave. */
function offer(select, choices) {
  const chosen = select.value;
  if (!choices.some(([value]) => value === chosen)) choices = [...choices, [chosen, chosen, 0]];
  select.replaceChildren(...choices.map(([value, label, rows]) => {
    const option = make("option", "", rows === null ? label : `${label || "no name"} (${rows.toLocaleString("en")})`);
    option.value = value;
    return option;
  }));
  select.value = chosen;
}

let about = { rows: 0 };

function tellProgress(decided) {
  const counts = Object.entries(decided).filter(([, rows]) => rows);
  const total = counts.reduce((sum, [, rows]) => sum + rows, 0);
  const kinds = counts.map(([kind, rows]) => `${rows.toLocaleString("en")} ${NAMES[kind]}`).join(", ");
  progress.textContent = `${total.toLocaleString("en")} of ${about.rows.toLocaleString("en")} decided${kinds ? `: ${kinds}` : ""}`;
}

// ---- the list ----

let asked = 0; // stretches on their way

/** Draw the rows in sight. A list taller than browsers can draw moves faster under its scroll bar. */
function drawList() {
  const whole = view.total * ROW, tall = Math.min(whole, TALLEST), height = list.clientHeight;
  space.style.height = `${tall}px`;
  const top = whole > tall ? (list.scrollTop / (tall - height)) * (whole - height) : list.scrollTop;
  const first = Math.max(0, Math.floor(top / ROW) - EXTRA);
  const last = Math.min(view.total, Math.ceil((top + height) / ROW) + EXTRA);
  const drawn = new Map([...space.children].map((item) => [Number(item.dataset.place), item]));
  for (const [index, item] of drawn) if (index < first || index >= last) item.remove();
  for (let index = first; index < last; index += 1) {
    let item = drawn.get(index);
    if (!item) {
      item = emptyEntry(index);
      space.append(item);
    }
    item.style.transform = `translateY(${index * ROW + list.scrollTop - top}px)`;
    const entry = entryAt(index);
    if (entry && item.entry !== entry) fillEntry(item, entry);
    item.setAttribute("aria-selected", String(index === at));
  }
  list.setAttribute("aria-activedescendant", `row-${at}`);
}

function emptyEntry(index) {
  const item = make("div", "entry");
  item.id = `row-${index}`;
  item.dataset.place = index;
  item.setAttribute("role", "option");
  item.setAttribute("aria-busy", "true");
  item.setAttribute("aria-setsize", view.total);
  item.setAttribute("aria-posinset", index + 1);
  item.append(make("span", "title", "…"), make("span", "about"));
  return item;
}

function fillEntry(item, entry) {
  item.removeAttribute("aria-busy");
  item.entry = entry;
  const name = make("span", "title", entry.title);
  name.dir = "auto";
  const facts = make("span", "about");
  facts.append(make("span", entry.outcome === "ok" ? "" : "refused", entry.outcome));
  if (entry.group === "held-out") facts.append(make("span", "", "held out"));
  if (entry.jaccard !== null) facts.append(make("span", "", `J ${entry.jaccard.toFixed(0)}`));
  if (entry.length_ratio !== null) facts.append(make("span", "", `× ${entry.length_ratio.toFixed(2)}`));
  if (entry.decision) facts.append(make("span", `mark ${entry.decision}`, NAMES[entry.decision]));
  item.replaceChildren(name, facts);
}

/** The entry at a place of the view; nothing, and it is asked for, where it is not here yet. */
function entryAt(index) {
  const number = Math.floor(index / STRETCH);
  const entries = stretches.get(number);
  if (entries === undefined && asked < AT_ONCE) attempt(() => fetchStretch(number));
  return entries?.[index % STRETCH];
}

async function fetchStretch(number) {
  const of = view.view;
  const mine = stretches;
  mine.set(number, null);
  asked += 1;
  let found;
  try {
    found = await ask("api/rows", { view: of, start: number * STRETCH, count: STRETCH });
  } catch (error) {
    mine.delete(number);
    throw error;
  } finally {
    asked -= 1;
  }
  if (mine !== stretches) {
    drawSoon(); // another view is shown by now, and may have waited for its turn
    return;
  }
  if (found.gone) return look();
  mine.set(number, found.rows);
  for (const old of mine.keys()) if (mine.size > STRETCHES && mine.get(old)) mine.delete(old);
  tellProgress(found.decided);
  drawSoon();
}

let drawing = false;

function drawSoon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => { drawing = false; drawList(); });
}

/** Scroll as little as it takes to have a place in sight. */
function bringIntoSight(index) {
  const whole = view.total * ROW, height = list.clientHeight;
  const scale = whole > TALLEST ? (TALLEST - height) / (whole - height) : 1;
  const top = list.scrollTop / scale;
  if (index * ROW < top) list.scrollTop = index * ROW * scale;
  else if ((index + 1) * ROW > top + height) list.scrollTop = ((index + 1) * ROW - height) * scale;
}

// ---- one pair ----

let going = new AbortController();

/** Show the row at a place of the view. */
async function go(index) {
  if (!mayLeave()) return;
  going.abort();
  going = new AbortController();
  const { signal } = going;
  at = Math.max(0, Math.min(index, view.total - 1));
  current = null;
  article.setAttribute("aria-busy", "true");
  place.textContent = view.total ? `${(at + 1).toLocaleString("en")} of ${view.total.toLocaleString("en")}` : "";
  buttons.previous.disabled = at === 0;
  buttons.next.disabled = at >= view.total - 1;
  bringIntoSight(at);
  drawList();
  if (!view.total) {
    showNothing();
    return;
  }
  const entry = entryAt(at) ?? (await ask("api/rows", { view: view.view, start: at, count: 1 }, signal)).rows[0];
  if (!entry) return look();
  const pair = await ask("api/pair", { row: entry.row }, signal);
  if (signal.aborted) return;
  showPair(pair);
  article.scrollTop = 0;
  const [hit] = markHits(article, search.value);
  if (hit) bringHitIntoSight(hit);
}

function bringHitIntoSight(range) {
  const hit = range.getBoundingClientRect(), frame = article.getBoundingClientRect();
  if (hit.bottom > frame.bottom || hit.top < frame.top) article.scrollTop += hit.top - frame.top - frame.height / 3;
}

function showNothing() {
  article.setAttribute("aria-busy", "false");
  article.replaceChildren(make("p", "empty", search.value ? "No row says this." : "No row is left by these filters."));
  for (const name of ["keep", "drop", "edit", "undo"]) buttons[name].disabled = true;
}

function showPair(pair) {
  current = pair;
  editing = null;
  article.setAttribute("aria-busy", "false");
  const parts = pairView(pair, isMerged());
  // what was decided stands first, what cannot be decided after the reason
  parts.splice(pair.detail && !pair.decision ? 2 : 1, 0, ...decisionLines(pair));
  for (const { name, parts: changes } of pair.before) {
    const details = make("details");
    const answer = pair.method === "clair" ? { chosen: "revision", rejected: "answer" }[name] : `${name} answer`;
    details.append(make("summary", "", `What the edit changed in the ${answer}`), marked(changes, null));
    parts.push(details);
  }
  article.replaceChildren(...parts);
  const kind = pair.decision?.kind;
  for (const name of ["keep", "drop", "edit"]) {
    buttons[name].className = name;
    buttons[name].setAttribute("aria-pressed", String(kind === name));
  }
  buttons.keep.disabled = Boolean(pair.obstacle);
  buttons.keep.title = pair.obstacle;
  buttons.drop.disabled = false;
  buttons.edit.disabled = !pair.editable;
  buttons.undo.disabled = !kind && !lastDecided;
  note.value = pair.decision?.note ?? "";
}

function decisionLines(pair) {
  if (pair.decision) {
    const line = make("p", `decision ${pair.decision.kind}`);
    const words = NAMES[pair.decision.kind];
    line.append(make("strong", "", words[0].toUpperCase() + words.slice(1)));
    if (pair.decision.note) line.append(`: ${visible(pair.decision.note)}`);
    const when = new Date(pair.decision.time);
    if (!Number.isNaN(when.getTime())) line.append(make("time", "", ` · ${when.toLocaleString("en", { dateStyle: "medium", timeStyle: "short" })}`));
    return [line];
  }
  if (pair.outcome === "ok" || !pair.obstacle) return [];
  return [make("p", "hint", `Cannot be kept as it is: ${pair.obstacle}.${pair.editable ? " An edit can mend it." : ""}`)];
}

function isMerged() {
  return buttons.merge.getAttribute("aria-pressed") === "true";
}

function merge() {
  buttons.merge.setAttribute("aria-pressed", String(!isMerged()));
  if (!current || editing) return;
  const { scrollTop } = article;
  showPair(current);
  markHits(article, search.value);
  article.scrollTop = scrollTop;
}

// ---- decisions ----

/** Write a decision about the pair that is shown; after keep and drop the next row shows. */
async function decide(kind, texts = {}) {
  if (saving || (editing && kind !== "edit")) return;
  if (!current) {
    if (view.total) say("Not decided: this pair is still on its way.", true);
    return;
  }
  if (kind === "keep" && current.obstacle) {
    say(`This row cannot be kept: ${current.obstacle}.`, true);
    return;
  }
  saving = true;
  try {
    const pair = await write(current.row, kind, texts, kind === "undo" ? "" : note.value);
    lastDecided = kind === "undo" ? null : { row: pair.row, at, view: view.view };
    if ((kind === "keep" || kind === "drop") && at < view.total - 1) await go(at + 1);
    else showPair(pair);
  } finally {
    saving = false;
  }
}

/** Send a decision; what the server then knows of the row stands in the list when this returns. */
async function write(row, kind, texts, words) {
  const reply = await tell("api/decide", { row, decision: kind, texts, note: words });
  // the same pair may stand in several rows
  const changed = new Map([reply.pair.entry, ...reply.rows].map((entry) => [entry.row, entry]));
  for (const entries of stretches.values())
    entries?.forEach((entry, index) => { entries[index] = changed.get(entry.row) ?? entry; });
  tellProgress(reply.decided);
  drawList();
  const now = reply.pair.decision ? NAMES[reply.pair.decision.kind] : "undone";
  say(`${now[0].toUpperCase()}${now.slice(1)}.${reply.pair.decision ? " U undoes it." : ""}`);
  return reply.pair;
}

/** Take back what was decided about this row, else the last decision that was made here, and show its row. */
async function undo() {
  if (!current || saving || editing) return;
  if (current.decision) {
    await decide("undo");
    return;
  }
  if (!lastDecided) {
    say("Nothing to undo.");
    return;
  }
  const { row, at: where, view: of } = lastDecided;
  saving = true;
  try {
    await write(row, "undo", {}, "");
    lastDecided = null;
    if (of === view.view) await go(where);
  } finally {
    saving = false;
  }
}

async function saveNote() {
  note.blur();
  const kind = current?.decision?.kind;
  if (!kind) {
    say("The note is saved with the decision: K, D or E.");
    return;
  }
  saving = true;
  try {
    const texts = kind === "edit" ? await ask("api/texts", { row: current.row }) : {};
    showPair(await write(current.row, kind, texts, note.value));
  } finally {
    saving = false;
  }
}

// ---- edits ----

async function edit() {
  if (!current || editing || saving) return;
  if (!current.editable) {
    say("This row could not be read, so there is nothing to edit.", true);
    return;
  }
  const pair = current;
  const texts = await ask("api/texts", { row: pair.row });
  if (pair !== current) return;
  const form = make("form", "editing");
  const fields = {};
  for (const name of ["rejected", "chosen"]) {
    const label = make("label", "", name === "rejected" ? "Rejected answer" : "Chosen answer");
    const field = document.createElement("textarea");
    field.name = name;
    field.value = texts[name];
    field.dir = "auto";
    // a text field has one kind of line end, so what was not touched is not sent
    fields[name] = { field, before: field.value };
    label.append(field);
    form.append(label);
  }
  const save = make("button", "primary", "Save ");
  save.append(make("kbd", "", "Ctrl Enter"));
  const cancel = make("button", "", "Cancel ");
  cancel.append(make("kbd", "", "Esc"));
  cancel.type = "button";
  cancel.addEventListener("click", () => attempt(leaveEdit));
  form.addEventListener("submit", (event) => { event.preventDefault(); attempt(saveEdit); });
  const row = make("div", "buttons");
  row.append(save, cancel);
  form.append(row);
  editing = { fields };
  article.querySelector(".answers").replaceWith(form);
  form.scrollIntoView({ block: "nearest" });
  fields.chosen.field.focus({ preventScroll: true });
  fields.chosen.field.setSelectionRange(0, 0);
}

function changes() {
  if (!editing) return {};
  const touched = Object.entries(editing.fields).filter(([, { field, before }]) => field.value !== before);
  return Object.fromEntries(touched.map(([name, { field }]) => [name, field.value]));
}

async function saveEdit() {
  const texts = changes();
  if (Object.keys(texts).length) await decide("edit", texts);
  else showPair(current);
  markHits(article, search.value);
}

async function leaveEdit() {
  if (mayLeave()) showPair(current);
}

function mayLeave() {
  if (Object.keys(changes()).length && !confirm("Leave the edit? What was typed would be lost.")) return false;
  editing = null;
  return true;
}

// ---- hands ----

const KEYS = {
  j: () => go(at + 1), ArrowDown: () => go(at + 1), ArrowRight: () => go(at + 1),
  k: () => go(at - 1), ArrowUp: () => go(at - 1), ArrowLeft: () => go(at - 1),
  Home: () => go(0), End: () => go(view.total - 1),
  keep: () => decide("keep"), d: () => decide("drop"), e: edit, u: undo, m: merge,
  n: () => note.focus(), "/": () => search.focus(), "?": () => help.showModal(),
  " ": () => article.scrollBy({ top: article.clientHeight * 0.85 }),
};

/** The name that a key has in KEYS: K keeps and k goes back, also while Caps Lock is on. */
function keyName(event) {
  if (event.key.length > 1) return event.key;
  const lower = event.key.toLowerCase();
  if (lower !== "k") return lower;
  const capital = event.key === "K";
  return (event.getModifierState("CapsLock") ? event.shiftKey : capital) ? "keep" : "k";
}

function onKey(event) {
  if (help.open) return;
  const typing = event.target.closest?.("input, textarea, select");
  if (editing && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    attempt(saveEdit);
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (editing) attempt(leaveEdit);
    else if (typing) typing.blur();
    return;
  }
  if (typing) {
    if (event.key === "Enter" && typing === note) attempt(saveNote);
    if (event.key === "Enter" && typing === search) typing.blur();
    return;
  }
  // a button's own key
  if ((event.key === " " || event.key === "Enter") && event.target.closest?.("button, summary")) return;
  const name = keyName(event);
  if (!Object.hasOwn(KEYS, name)) return;
  event.preventDefault();
  attempt(async () => KEYS[name]());
}

function listen() {
  let pause;
  search.addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(() => attempt(look), PAUSE);
  });
  for (const select of [show, decision, method, order]) select.addEventListener("change", () => attempt(look));
  list.addEventListener("scroll", drawSoon, { passive: true });
  list.addEventListener("click", (event) => {
    const item = event.target.closest(".entry");
    if (!item) return;
    document.body.classList.add("reading");
    attempt(() => go(Number(item.dataset.place)));
  });
  addEventListener("resize", drawSoon);
  addEventListener("keydown", onKey);
  buttons.back.addEventListener("click", () => { document.body.classList.remove("reading"); drawList(); bringIntoSight(at); });
  buttons.previous.addEventListener("click", () => attempt(() => go(at - 1)));
  buttons.next.addEventListener("click", () => attempt(() => go(at + 1)));
  for (const kind of ["keep", "drop"]) buttons[kind].addEventListener("click", () => attempt(() => decide(kind)));
  buttons.edit.addEventListener("click", () => attempt(edit));
  buttons.undo.addEventListener("click", () => attempt(undo));
  buttons.merge.addEventListener("click", merge);
  document.getElementById("help-close").addEventListener("click", () => help.close());
  buttons["help-button"].addEventListener("click", () => help.showModal());
  addEventListener("hashchange", () => location.reload());
  addEventListener("beforeunload", (event) => { if (Object.keys(changes()).length) event.preventDefault(); });
  // another tab may have decided meanwhile
  addEventListener("focus", () => attempt(async () => {
    if (editing || saving || !current) return;
    stretches = new Map();
    const pair = await ask("api/pair", { row: current.row });
    if (current?.row === pair.row && !editing && !saving && JSON.stringify(pair.decision) !== JSON.stringify(current.decision)) showPair(pair);
    drawSoon();
  }));
}

async function start() {
  listen();
  about = await ask("api/about");
  title.textContent = about.title;
  document.title = `${about.title} · Anchored`;
  document.getElementById("file").textContent = about.file;
  await look();
}

attempt(start);
