// The page begins: its cards, its tools, and what its address asks for.

byId("lines").append(...page.lines.map((line) => make("p", "", line)));
byId("cards").className = page.layout;
byId("cards").append(...cards.map(makeCard));
fillTools();
setChoices(new URLSearchParams(location.hash.slice(1)));
show();
