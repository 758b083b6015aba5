"use strict";
// What the page of influences does: lists queries with their strongest examples, and finds them.
// Text from the data reaches the page as text nodes only, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const { element, number } = pergradPage;
  const FIRST = 10; // examples at each end, before "Show more"
  const PAGE = 20; // queries

  function picture(url, name) {
    const box = element("span", "picture");
    const image = element("img");
    image.alt = name;
    image.addEventListener("load", () => {
      if (Math.max(image.naturalWidth, image.naturalHeight) <= 64) image.className = "tiny";
    });
    image.src = url;
    box.append(image);
    return box;
  }

  function seen(preview, name) {
    const parts = [];
    if (preview.image) parts.push(picture(preview.image, name));
    if (preview.text) parts.push(element("span", "text", preview.text));
    if (preview.error) parts.push(element("span", "missing", `No preview: ${preview.error}`));
    if (preview.label) parts.push(element("span", "label", preview.label));
    for (const [key, value] of preview.more || []) {
      parts.push(element("span", "extra", `${key}: ${value}`));
    }
    return parts;
  }

  function open(row, score, what, query) {
    const box = element("div", "big");
    const list = element("dl");
    const add = (term, value) => list.append(element("dt", "", term), element("dd", "", value));
    add("example", data.names[row]);
    add("index", String(row));
    add(what, number(score));
    const parts = (what === "score" && query.layers?.[row]) || [];
    for (const [layer, part] of parts) add(`${data.layers[layer]}`, number(part));
    if (parts.length && parts.length < data.layers.length) {
      const rest = parts.reduce((left, [, part]) => left - part, score);
      add(`${data.layers.length - parts.length} other layers`, number(rest));
    }
    box.append(...seen(data.scored[row] || {}, data.names[row]), list);
    get("full-content").replaceChildren(box);
    get("full").showModal();
  }
  get("full").addEventListener("click", (event) => {
    if (event.target === get("full")) get("full").close();
  });

  function card([row, score], most, what, query) {
    const item = element("li");
    const button = element("button", "card");
    button.type = "button";
    button.append(...seen(data.scored[row] || {}, data.names[row]));
    const numbers = element("span", "numbers");
    numbers.append(element("b", "", data.names[row]), element("span", "", number(score)));
    const bar = element("i", score < 0 ? "score below" : "score");
    bar.style.width = `${most > 0 ? (100 * Math.abs(score)) / most : 0}%`;
    numbers.append(bar);
    button.append(numbers);
    button.addEventListener("click", () => open(row, score, what, query));
    item.append(button);
    return item;
  }

  function end(title, rows, most, query, what = "score") {
    const parts = [element("h3", "", title)];
    const list = element("ul", "cards");
    if (rows.some(([row]) => data.scored[row]?.text)) list.classList.add("texts");
    list.append(...rows.slice(0, FIRST).map((row) => card(row, most, what, query)));
    parts.push(list);
    if (rows.length > FIRST) {
      const more = element("button", "more", `Show ${rows.length - FIRST} more`);
      more.type = "button";
      more.addEventListener("click", () => {
        list.append(...rows.slice(FIRST).map((row) => card(row, most, what, query)));
        more.remove();
        list.children[FIRST].querySelector("button").focus();
      });
      parts.push(more);
    }
    return parts;
  }

  function section(q) {
    const query = data.queries[q];
    const box = element("section", "query");
    const asked = element("div", "asked");
    const head = element("h2", "", `Query ${query.name}`);
    head.id = `query-${q}`;
    box.setAttribute("aria-labelledby", head.id);
    asked.append(head, ...seen(data.asked[q] || {}, query.name));
    const both = element("div");
    const most = Math.max(...[...query.high, ...query.low].map(([, score]) => Math.abs(score)));
    const words = get("queries").dataset;
    both.append(...end(words.high, query.high, most, query), ...end(words.low, query.low, most, query));
    if (query.near.length) both.append(...end(words.near, query.near, 1, query, "cosine"));
    box.append(asked, both);
    return box;
  }

  let listed = [];
  function grow() {
    const there = get("queries").children.length;
    get("queries").append(...listed.slice(there, there + PAGE).map(section));
    const left = listed.length - get("queries").children.length;
    get("more").hidden = left <= 0;
    get("more").textContent = `Show more (${left} left)`;
  }

  const words = data.queries.map((query, q) => {
    const { label, text, more } = data.asked[q] || {};
    return [query.name, label, text, ...(more || []).flat()].join("\n").toLowerCase();
  });
  function find() {
    const wanted = get("search").value.trim().toLowerCase();
    listed = [...words.keys()].filter((q) => words[q].includes(wanted));
    get("queries").replaceChildren();
    grow();
    const count = `${listed.length} of ${words.length} queries`;
    get("found").textContent = wanted ? count : "";
  }
  get("search").addEventListener("input", find);
  get("more").addEventListener("click", () => {
    const from = get("queries").children.length;
    grow();
    get("queries").children[from]?.querySelector("button")?.focus();
  });
  find();
  document.documentElement.dataset.ready = "yes";
})();
