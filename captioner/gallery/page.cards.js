"use strict";
// The cards of the page. All content of cards becomes text (textContent, setAttribute), never HTML.

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
  frame.append(makeImage(card, true));
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

function makeImage(card, isLazy) {
  const { data, width, height, reason, detail } = card.image;
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
    waiting.set(image, card);
  } else {
    image.src = source(card);
  }
  return image;
}

const source = (card) => `data:image/webp;base64,${card.image.data}`;
const waiting = new Map(); // image element -> card, until it is near
const nearby = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => load(entry.target)),
  { rootMargin: "150% 0px" },
);

function load(image) {
  if (!waiting.has(image)) return;
  image.addEventListener("load", () => image.classList.remove("waiting"), { once: true });
  image.src = source(waiting.get(image));
  waiting.delete(image);
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
  const chips = card.failed ? [] : card.tags.filter((tag) => !quiet.has(tag)); // why it failed is said in its place
  about.append(...chips.map((tag) => make("span", "chip", spoken(tag))));
  return about;
}

const tags = new Map();
cards.forEach((card) => card.tags.forEach((tag) => tags.set(tag, (tags.get(tag) ?? 0) + 1)));
const quiet = new Set(page.quiet);

const spoken = (name) => name.replaceAll("_", " ");

function written(value) {
  if (typeof value !== "number") return String(value);
  return String(Number.isInteger(value) ? value : Number(value.toPrecision(6))).replace("-", "\u2212");
}

function shortNumber(value) {
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return value.toLocaleString("en", { maximumSignificantDigits: 3 }).replace("-", "\u2212");
}
