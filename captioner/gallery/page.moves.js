// Moving about by keyboard, and the large view.

let enlarged = null;
let silence = null; // the timer that takes back what was said of a copy

function setCurrent(card) {
  if (current) current.frame.tabIndex = -1;
  current = card;
  if (current) current.frame.tabIndex = 0;
}

function move(step) {
  if (shown.length === 0) return;
  const isInside = byId("large").open || document.activeElement === current?.frame;
  const place = isInside ? shown.indexOf(current) + step : Number.isFinite(step) ? firstInSight() : step;
  const next = shown[Math.min(Math.max(place, 0), shown.length - 1)];
  setCurrent(next);
  if (byId("large").open) enlarge(next);
  else next.frame.focus();
  next.article.scrollIntoView({ block: "nearest" });
}

// The first card in sight: after scrolling, the keyboard continues from there.
function firstInSight() {
  const top = getComputedStyle(byId("tools")).position === "sticky" ? byId("tools").getBoundingClientRect().bottom : 0;
  return Math.max(0, shown.findIndex((card) => card.article.getBoundingClientRect().bottom > Math.max(0, top)));
}

function numColumns() {
  const top = shown[0].article.offsetTop;
  const next = shown.findIndex((card) => card.article.offsetTop !== top || card.failed !== shown[0].failed);
  return next < 0 ? shown.length : next;
}

const keys = {
  ArrowRight: () => move(1),
  ArrowLeft: () => move(-1),
  ArrowDown: () => move(byId("large").open ? 1 : numColumns()),
  ArrowUp: () => move(byId("large").open ? -1 : -numColumns()),
  j: () => move(1),
  k: () => move(-1),
  Home: () => move(-Infinity),
  End: () => move(Infinity),
  c: () => current && copy(current.id, "Id"),
  d: () => byId("dense").click(),
  "/": () => {
    byId("large").close();
    byId("find").focus();
    byId("find").select();
  },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isTyping = event.target.matches("input, select, textarea");
  if (event.key === "Escape" && isTyping) {
    if (event.target === byId("find")) byId("find").value = "";
    show();
    event.target.blur();
    event.preventDefault();
  } else if (event.key === "Enter" && event.target === byId("find")) {
    event.preventDefault();
    move(0);
  } else if (event.key === "Enter" && event.target === document.body && current) {
    event.preventDefault(); // it would press the first button of the large view
    open(shown[firstInSight()]);
  } else if (!isTyping && Object.hasOwn(keys, event.key) && (shown.length > 0 || event.key === "/")) {
    event.preventDefault();
    keys[event.key]();
  }
});

// ---- The large view

function open(card) {
  setCurrent(card);
  enlarge(card);
  byId("large").showModal();
  byId("large-about").focus({ preventScroll: true }); // on a phone it is below the image
}

// At once, not at the event "close", which comes after the next key: the browser itself goes back to where it was opened.
function leave() {
  byId("large").close();
  enlarged.frame.focus();
}

function enlarge(card) {
  enlarged = card;
  byId("large-image").replaceChildren(makeImage(card, false));
  byId("large-text").replaceChildren(...card.texts.map(makeText));
  const facts = [["image", card.id], ["path", card.path === card.id ? "" : card.path], ...Object.entries(card.facts)].filter(([, value]) => value !== null && value !== "");
  byId("copy-path").hidden = !card.path;
  byId("copied").value = "";
  byId("large-facts").replaceChildren(
    ...facts.flatMap(([name, value]) => [make("dt", "", spoken(name)), make("dd", "", written(value))]),
  );
  const place = shown.indexOf(card);
  byId("place").textContent = `${(place + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")}`;
  byId("before").disabled = place <= 0;
  byId("after").disabled = place >= shown.length - 1;
  byId("large").scrollTop = 0;
}

async function copy(text, what) {
  const isDone = await toClipboard(text);
  const told = byId(byId("large").open ? "copied" : "said");
  told.value = isDone ? `${what} copied` : "This browser lets no page copy; select it instead";
  clearTimeout(silence);
  silence = setTimeout(() => (byId("copied").value = byId("said").value = ""), 3000);
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text); // undefined on a page that came by http
    return true;
  } catch {
    const selected = make("textarea", "unseen");
    (byId("large").open ? byId("large") : document.body).append(selected);
    selected.value = text;
    selected.select();
    const isDone = document.execCommand("copy");
    selected.remove();
    return isDone;
  }
}

byId("copy-id").addEventListener("click", () => copy(enlarged.id, "Id"));
byId("copy-path").addEventListener("click", () => copy(enlarged.path, "Path"));
byId("before").addEventListener("click", () => move(-1));
byId("after").addEventListener("click", () => move(1));
for (const [what, leaves] of [["close", "click"], ["large-image", "click"], ["large", "cancel"]]) byId(what).addEventListener(leaves, leave);
