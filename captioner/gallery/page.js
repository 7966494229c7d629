"use strict";
// Everything that cards say is put on the screen as text (textContent, setAttribute), never as HTML.

const page = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const normal = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
const numberOf = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

const cards = page.cards.map((card, place) => {
  const texts = card.texts.filter((text) => !text.missing).map(plain).join(" ");
  return {
    ...card,
    place,
    numWords: card.words ?? 0,
    hasText: card.words !== null,
    // the kept columns are searched too; numbers are not: a search for 1 would find every score
    searched: normal([card.id, texts, ...card.tags, ...Object.entries(card.facts).filter(isText).map(([, value]) => value)].join("\n")),
  };
});
let shown = cards;
let current = null;
let enlarged = null;

function isText([name, value]) {
  return typeof value === "string" && name !== "key" && !/^-?\d{16,}$/.test(value); // those integers only came as text
}

function plain(text) {
  return text.runs.map(([, words]) => words).join("");
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// ---- One card

function makeCard(card) {
  const article = make("article", "card");
  const frame = make("button", "frame");
  frame.type = "button";
  frame.tabIndex = -1;
  frame.setAttribute("aria-label", `Enlarge ${card.id}`);
  frame.append(makePicture(card, true));
  const texts = make("div", "texts");
  texts.append(...card.texts.map(makeText));
  const right = page.layout === "pairs" ? make("div") : article;
  article.append(frame);
  right.append(texts, makeAbout(card));
  if (right !== article) article.append(right);
  frame.addEventListener("click", () => open(card));
  frame.addEventListener("focus", () => setCurrent(card));
  card.article = article;
  card.frame = frame;
  return article;
}

function makePicture(card, isLazy) {
  const { data, width, height, reason, detail } = card.picture;
  if (data === undefined) {
    const none = make("span", "none");
    none.append(make("b", "", reason.replaceAll("_", " ")), make("span", "", detail));
    return none;
  }
  const image = make("img", width / height > 4 / 3 ? "wide" : "tall");
  image.alt = "";
  image.width = width;
  image.height = height;
  image.decoding = "async";
  if (isLazy) {
    image.classList.add("waiting");
    nearby.observe(image);
    pictures.set(image, card);
  } else {
    image.src = source(card);
  }
  return image;
}

const source = (card) => `data:image/webp;base64,${card.picture.data}`;
const pictures = new Map();
const nearby = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => load(entry.target)),
  { rootMargin: "150% 0px" },
);

function load(image) {
  if (!pictures.has(image)) return;
  image.addEventListener("load", () => image.classList.remove("waiting"), { once: true });
  image.src = source(pictures.get(image));
  pictures.delete(image);
  nearby.unobserve(image);
}

function makeText(text) {
  const paragraph = make("p", text.missing ? "text missing" : "text");
  paragraph.dir = "auto";
  if (text.label) paragraph.append(make("span", "label", text.label));
  for (const [kind, words] of text.runs) {
    paragraph.append(kind === "same" ? words : makeChange(kind, words));
  }
  return paragraph;
}

function makeChange(kind, words) {
  const change = make(kind === "added" ? "ins" : "del");
  const trimmed = words.trimEnd();
  change.append(make("span", "unseen", `[${kind}: `), trimmed, make("span", "unseen", "]"));
  const both = document.createDocumentFragment();
  both.append(change, words.slice(trimmed.length));
  return both;
}

function makeAbout(card) {
  const about = make("p", "about");
  const name = make("span", "name", card.id.split("/").filter(Boolean).pop() ?? card.id);
  name.title = card.id;
  about.append(name);
  for (const score of page.scores) {
    const value = card.facts[score];
    if (value === undefined || value === null || value === "") continue;
    const item = make("span", typeof value === "number" ? "" : "said", `${spoken(score)} `);
    item.append(make("b", "", typeof value === "number" ? shortNumber(value) : String(value)));
    about.append(item);
  }
  if (card.hasText) about.append(make("span", "", numberOf(card.numWords, "word")));
  about.append(...card.tags.filter((tag) => isTelling(tag) && tag !== card.picture.reason).map((tag) => make("span", "", spoken(tag))));
  return about;
}

const tags = new Map();
cards.forEach((card) => card.tags.forEach((tag) => tags.set(tag, (tags.get(tag) ?? 0) + 1)));
const isTelling = (tag) => tags.get(tag) <= cards.length / 2;

const spoken = (name) => name.replaceAll("_", " ");

function written(value) {
  if (typeof value !== "number") return String(value);
  return String(Number.isInteger(value) ? value : Number(value.toPrecision(6))).replace("-", "\u2212");
}

function shortNumber(value) {
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return value.toLocaleString("en", { maximumSignificantDigits: 3 }).replace("-", "\u2212");
}

// ---- What is shown, and in which order

function isWanted(card, search) {
  const fewest = byId("fewest").value === "" ? 0 : byId("fewest").valueAsNumber;
  const most = byId("most").value === "" ? Infinity : byId("most").valueAsNumber;
  const tags = pressedTags();
  return (
    search.every((word) => card.searched.includes(word)) &&
    card.numWords >= fewest && card.numWords <= most &&
    (tags.length === 0 || card.tags.some((tag) => tags.includes(tag)))
  );
}

function sortValue(card) {
  const [, kind, name] = byId("sort").value.match(/^(\w+):?(.*)$/su); // a name may hold a colon itself
  if (kind === "words") return card.hasText ? card.numWords : null;
  if (kind === "name") return card.id;
  if (kind === "fact") return typeof card.facts[name] === "number" ? card.facts[name] : null;
  return card.place;
}

function compare(one, other) {
  const a = sortValue(one), b = sortValue(other);
  if (a === null || b === null) return (a === null) - (b === null) || one.place - other.place; // unknown stays last
  const order = typeof a === "string" ? collator.compare(a, b) : a - b;
  return (isTurned() ? -order : order) || one.place - other.place;
}

const collator = new Intl.Collator("en", { numeric: true });
const isTurned = () => byId("turn").getAttribute("aria-pressed") === "true";
const pressedTags = () => [...byId("tags").querySelectorAll("[aria-pressed=true]")].map((button) => button.value);

function show() {
  const search = normal(byId("find").value).split(/\s+/u).filter(Boolean);
  cards.forEach((card) => (card.article.hidden = !isWanted(card, search)));
  const order = [...cards].sort(compare);
  if (order.some((card, place) => byId("cards").children[place] !== card.article)) {
    byId("cards").append(...order.map((card) => card.article));
  }
  shown = order.filter((card) => !card.article.hidden);
  byId("nothing").hidden = shown.length > 0 || cards.length === 0;
  byId("count").value =
    shown.length === cards.length ? numberOf(cards.length, "image") : `${shown.length.toLocaleString("en")} of ${numberOf(cards.length, "image")}`;
  setCurrent(shown.includes(current) ? current : (shown[0] ?? null));
  highlight(search);
  sayOrder();
}

function highlight(search) {
  if (!CSS.highlights) return;
  CSS.highlights.delete("found");
  const ranges = search.length === 0 ? [] : shown.flatMap((card) => rangesIn(card.article, search));
  if (ranges.length) CSS.highlights.set("found", new Highlight(...ranges));
}

function rangesIn(article, search) {
  const found = [];
  for (const element of article.querySelectorAll(".text, .name")) {
    const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const { text, starts, ends } = folded(node.data);
      for (const word of search) {
        for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
          const [startOffset, endOffset] = [starts[at], ends[at + word.length - 1]];
          found.push(new StaticRange({ startContainer: node, startOffset, endContainer: node, endOffset }));
        }
      }
    }
  }
  return found;
}

// What is searched of a text, and where in the text each of its characters comes from: "é" is found as "e".
function folded(whole) {
  const starts = [], ends = [];
  let text = "", at = 0;
  for (const character of whole) {
    const part = /^[\0-\x7f]$/.test(character) ? character.toLowerCase() : normal(character);
    at += character.length;
    for (let unit = 0; unit < part.length; unit++) {
      starts.push(at - character.length);
      ends.push(at);
    }
    text += part;
    if (part === "" && ends.length) ends[ends.length - 1] = at; // a mark belongs to the letter before it
  }
  return { text, starts, ends };
}

// ---- Moving about

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

// Where the eyes are: whoever scrolled and then takes the keyboard goes on from there.
function firstInSight() {
  const top = getComputedStyle(byId("tools")).position === "sticky" ? byId("tools").getBoundingClientRect().bottom : 0;
  return Math.max(0, shown.findIndex((card) => card.article.getBoundingClientRect().bottom > Math.max(0, top)));
}

function numColumns() {
  const top = shown[0].article.offsetTop;
  const next = shown.findIndex((card) => card.article.offsetTop !== top);
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
  byId("large-about").focus({ preventScroll: true }); // on a phone it stands below the picture
}

function enlarge(card) {
  enlarged = card;
  byId("large-picture").replaceChildren(makePicture(card, false));
  byId("large-text").replaceChildren(...card.texts.map(makeText));
  const facts = [["image", card.id], ...Object.entries(card.facts)].filter(([, value]) => value !== null && value !== "");
  byId("large-facts").replaceChildren(
    ...facts.flatMap(([name, value]) => [make("dt", "", spoken(name)), make("dd", "", written(value))]),
  );
  const place = shown.indexOf(card);
  byId("place").textContent = `${(place + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")}`;
  byId("before").disabled = place <= 0;
  byId("after").disabled = place >= shown.length - 1;
  byId("large").scrollTop = 0;
}

byId("before").addEventListener("click", () => move(-1));
byId("after").addEventListener("click", () => move(1));
byId("close").addEventListener("click", () => byId("large").close());
byId("large").addEventListener("close", () => {
  if (document.activeElement !== byId("find")) enlarged.frame.focus(); // the browser goes back to where it was opened
});
byId("large-picture").addEventListener("click", () => byId("large").close());

// ---- The tools

function fillTools() {
  const names = new Set();
  cards.forEach((card) => Object.entries(card.facts).forEach(([name, value]) => typeof value === "number" && names.add(name)));
  const options = [["listed", "as listed"], ...[...names].map((name) => [`fact:${name}`, spoken(name)]), ["words", "words"], ["name", "name"]];
  byId("sort").replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  const failed = new Set(cards.filter((card) => card.failed).flatMap((card) => card.tags));
  if ([...tags.values()].some((count) => count < cards.length)) byId("tags").append(...[...tags].map((entry) => makeTag(...entry, failed)));
  const lengths = cards.filter((card) => card.hasText).map((card) => card.numWords);
  byId("fewest").placeholder = String(lengths.length ? lengths.reduce((a, b) => Math.min(a, b)) : 0);
  byId("most").placeholder = String(lengths.length ? lengths.reduce((a, b) => Math.max(a, b)) : 0);
}

function makeTag(tag, count, failed) {
  const button = make("button", failed.has(tag) ? "wrong" : "", spoken(tag));
  button.type = "button";
  button.value = tag;
  button.setAttribute("aria-pressed", "false");
  button.append(make("small", "", count.toLocaleString("en")));
  button.addEventListener("click", () => press(button));
  return button;
}

function press(button) {
  button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
  show();
}

function sayOrder() {
  const [kind] = byId("sort").value.split(":", 1);
  const orders = { listed: ["first to last", "last to first"], name: ["A to Z", "Z to A"], words: ["fewest first", "most first"] };
  byId("turn").textContent = (orders[kind] ?? ["lowest first", "highest first"])[Number(isTurned())];
}

byId("tools").addEventListener("submit", (event) => event.preventDefault());
["find", "fewest", "most"].forEach((id) => byId(id).addEventListener("input", show));
byId("sort").addEventListener("change", show);
byId("turn").addEventListener("click", () => press(byId("turn")));
byId("clear").addEventListener("click", () => {
  byId("tools").reset();
  document.querySelectorAll("[aria-pressed]").forEach((button) => button.setAttribute("aria-pressed", "false"));
  show();
});
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});
window.addEventListener("beforeprint", () => [...pictures.keys()].forEach(load));

byId("lines").append(...page.lines.map((line) => make("p", "", line)));
byId("cards").className = page.layout;
byId("cards").append(...cards.map(makeCard));
fillTools();
show();
