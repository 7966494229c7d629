// What is shown, and in which order: the tools, and the address that keeps what they were set to.

let shown = cards;
let current = null;

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
  if (one.failed !== other.failed) return one.failed - other.failed; // apart, after all others
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
  const firstFailed = order.findIndex((card) => card.failed);
  const articles = order.map((card) => card.article);
  if (firstFailed >= 0) articles.splice(firstFailed, 0, failedHeading);
  if (articles.some((article, place) => byId("cards").children[place] !== article)) byId("cards").append(...articles);
  shown = order.filter((card) => !card.article.hidden);
  sayFailed(shown.filter((card) => card.failed).length);
  byId("nothing").hidden = shown.length > 0 || cards.length === 0;
  sayCount();
  setCurrent(shown.includes(current) ? current : (shown[0] ?? null));
  highlight(search);
  sayOrder();
  keepInAddress();
}

function sayCount() {
  const [number, noun] = numberOf(cards.length, "image").split(" ");
  const some = shown.length === cards.length ? "" : `${shown.length.toLocaleString("en")} of `;
  byId("count").replaceChildren(`${some}${number}`, make("span", "noun", ` ${noun}`));
}

const failedHeading = make("h2", "failed");

function sayFailed(count) {
  failedHeading.hidden = count === 0;
  const isPairs = page.layout === "pairs";
  failedHeading.textContent = `${numberOf(count, "image")} without a caption${isPairs ? " in one table or both" : ""}`;
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

// The searched form of a text, and where in the text each of its characters comes from: "é" is found as "e".
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

// ---- The address: what was chosen stands after its #, to be kept and sent

const isDense = () => byId("dense").getAttribute("aria-pressed") === "true";

function setDense(isPressed) {
  byId("dense").setAttribute("aria-pressed", String(isPressed));
  document.body.classList.toggle("dense", isPressed);
}

function choices() {
  const chosen = new URLSearchParams();
  if (byId("find").value) chosen.set("find", byId("find").value);
  if (byId("sort").value !== "listed") chosen.set("sort", byId("sort").value);
  if (isTurned()) chosen.set("turned", "yes");
  for (const id of ["fewest", "most"]) if (byId(id).value) chosen.set(id, byId(id).value);
  pressedTags().forEach((tag) => chosen.append("only", tag));
  if (isDense()) chosen.set("view", "dense");
  return chosen;
}

// An address is anybody's: values only, and of a list only what it has.
function setChoices(chosen) {
  for (const id of ["find", "fewest", "most"]) byId(id).value = chosen.get(id) ?? "";
  const sort = chosen.get("sort");
  byId("sort").value = [...byId("sort").options].some((option) => option.value === sort) ? sort : "listed";
  byId("turn").setAttribute("aria-pressed", String(chosen.get("turned") === "yes"));
  const only = new Set(chosen.getAll("only"));
  for (const button of byId("tags").children) button.setAttribute("aria-pressed", String(only.has(button.value)));
  setDense(chosen.get("view") === "dense");
}

function keepInAddress() {
  const kept = choices().toString();
  if (kept === location.hash.slice(1)) return;
  try {
    history.replaceState(null, "", kept ? `#${kept}` : location.href.split("#", 1)[0]);
  } catch {
    // in the frame of another page, which has no address of its own, and for a while after a hundred changes in Safari
  }
}

// ---- The tools

function fillTools() {
  const names = new Set();
  cards.forEach((card) => Object.entries(card.facts).forEach(([name, value]) => typeof value === "number" && names.add(name)));
  const options = [["listed", "as listed"], ...[...names].map((name) => [`fact:${name}`, spoken(name)]), ["words", "words"], ["name", "name"]];
  byId("sort").replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  const fine = new Set(cards.filter((card) => !card.failed).flatMap((card) => card.tags));
  const failed = new Set([...tags.keys()].filter((tag) => !fine.has(tag)));
  if ([...tags.values()].some((count) => count < cards.length)) byId("tags").append(...tagsInOrder(failed).map((entry) => makeTag(...entry, failed)));
  const lengths = cards.filter((card) => card.hasText).map((card) => card.numWords);
  byId("fewest").placeholder = String(lengths.length ? lengths.reduce((a, b) => Math.min(a, b)) : 0);
  byId("most").placeholder = String(lengths.length ? lengths.reduce((a, b) => Math.max(a, b)) : 0);
}

// What is remarkable comes first, what failed last; among equals the most frequent.
function tagsInOrder(failed) {
  const rank = ([tag]) => (failed.has(tag) ? 2 : Number(quiet.has(tag)));
  return [...tags].sort((one, other) => rank(one) - rank(other) || other[1] - one[1]);
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
  setChoices(new URLSearchParams(isDense() ? "view=dense" : ""));
  show();
});
byId("dense").addEventListener("click", () => {
  setDense(!isDense());
  keepInAddress();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the fragment of the address is taken
  byId("cards").focus();
});
window.addEventListener("hashchange", () => {
  setChoices(new URLSearchParams(location.hash.slice(1)));
  show();
});
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});
window.addEventListener("beforeprint", () => [...waiting.keys()].forEach(load));
