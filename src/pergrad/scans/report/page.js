"use strict";
// What the page does: draws the figures, shows the example pointed at, lists those selected.
// Text from the data reaches the page as text nodes only, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const examples = data.examples;
  const get = (id) => document.getElementById(id);
  const figures = {};
  const FIRST = 12; // cards, before "Show more"
  const PAGE = 48;

  // --- small things ----------------------------------------------------------------------------

  const { element, number, percent, inside, column } = pergradPage;

  const name = (row) => {
    const key = examples.key ? examples.key[row] : null;
    return key === null || key === "" ? `#${examples.index[row]}` : key;
  };

  // --- an example ------------------------------------------------------------------------------

  function picture(url, row) {
    const box = element("span", "picture");
    const image = element("img");
    image.alt = `Example ${name(row)}`;
    image.addEventListener("load", () => {
      if (Math.max(image.naturalWidth, image.naturalHeight) <= 64) image.className = "tiny";
    });
    image.src = url;
    box.append(image);
    return box;
  }

  function seen(row) {
    const parts = [];
    const preview = data.previews[row];
    if (!preview) return parts;
    if (preview.image) parts.push(picture(preview.image, row));
    if (preview.text) parts.push(element("span", "text", preview.text));
    if (preview.error) parts.push(element("span", "missing", `No preview: ${preview.error}`));
    return parts;
  }

  function card(row, note) {
    const item = element("li");
    const button = element("button", "card");
    button.type = "button";
    button.dataset.row = row;
    const preview = data.previews[row] || {};
    button.append(...seen(row));
    if (preview.label) button.append(element("span", "label", preview.label));
    for (const [key, value] of preview.more || []) {
      button.append(element("span", "extra", `${key}: ${value}`));
    }
    const numbers = element("span", "numbers");
    const share = percent(examples.share[row]);
    const norm = `norm ${number(examples.norm[row])}${share === null ? "" : ` (${share})`}`;
    const other = note ?? `loss ${number(examples.loss[row])}`;
    numbers.append(element("b", "", name(row)), element("span", "", norm), element("span", "", other));
    button.append(numbers);
    button.addEventListener("click", () => open(row));
    item.append(button);
    return item;
  }

  function details(row) {
    const box = element("div", "big");
    const preview = data.previews[row] || {};
    box.append(...seen(row));
    if (preview.label) box.append(element("span", "label", preview.label));
    const list = element("dl");
    const add = (term, value) => list.append(element("dt", "", term), element("dd", "", value));
    for (const [key, value] of preview.more || []) add(key, value);
    if (examples.key) add("key", name(row));
    add("index", String(examples.index[row]));
    add("norm", number(examples.norm[row]));
    add("loss", number(examples.loss[row]));
    const share = percent(examples.share[row]);
    if (share !== null) add("share", `${share} of the squared norm`);
    if (examples.error[row]) add("error", examples.error[row]);
    box.append(list);
    return box;
  }

  function open(row) {
    get("full-content").replaceChildren(details(row));
    get("full").showModal();
  }
  get("full").addEventListener("click", (event) => {
    if (event.target === get("full")) get("full").close();
  });

  // A list of cards is one stop of the tab key; arrows go from card to card.
  for (const list of document.querySelectorAll("ul.cards")) {
    const cards = () => [...list.querySelectorAll("button.card")];
    list.addEventListener("focusin", (event) => {
      for (const one of cards()) one.tabIndex = one === event.target.closest("button") ? 0 : -1;
    });
    list.addEventListener("keydown", (event) => {
      const all = cards();
      const at = all.indexOf(document.activeElement);
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1,
        Home: 0, End: all.length - 1 }[event.key];
      if (at < 0 || to === undefined) return;
      all[Math.min(all.length - 1, Math.max(0, to))].focus();
      event.preventDefault();
    });
  }

  // A list of cards that grows on demand.
  function fill(list, more, rows, notes) {
    let shown = 0;
    const grow = () => {
      const next = rows.slice(shown, shown + (shown ? PAGE : FIRST));
      list.append(...next.map((row, k) => card(row, notes ? notes[shown + k] : undefined)));
      list.querySelectorAll("button.card").forEach((one, k) => { if (k) one.tabIndex = -1; });
      shown += next.length;
      if (more) {
        more.hidden = shown >= rows.length;
        more.textContent = `Show more (${(rows.length - shown).toLocaleString("en")} left)`;
      }
    };
    list.replaceChildren();
    const first = rows.slice(0, 20).map((row) => data.previews[row]);
    list.classList.toggle("texts", first.some((p) => p && p.text));
    if (more) {
      more.onclick = () => {
        const from = list.children.length;
        grow();
        list.children[from]?.querySelector("button").focus();
      };
    }
    grow();
  }

  // --- rankings, references, layers ------------------------------------------------------------

  const orders = {
    norm: (a, b) => examples.norm[b] - examples.norm[a],
    loss: (a, b) => examples.loss[b] - examples.loss[a],
    small: (a, b) => examples.norm[a] - examples.norm[b],
    index: (a, b) => a - b,
  };
  const finite = (row) => typeof examples.norm[row] === "number" && typeof examples.loss[row] === "number";

  function rank() {
    if (!get("top-cards")) return;
    const which = document.querySelector("input[name=ranking]:checked")?.value || "norm";
    const all = [...examples.index.keys()];
    const rows = filter.on
      ? all.filter((row) => filter.passes(row) && finite(row)).sort(orders[which])
      : data.lists[which];
    fill(get("top-cards"), get("top-more"), rows);
    if (!rows.length) get("top-cards").append(element("li", "extra", "There are none."));
  }
  for (const input of document.querySelectorAll("input[name=ranking]")) {
    input.addEventListener("change", rank);
  }

  // --- filter and colour -----------------------------------------------------------------------

  // What examples can be told apart by: the label, and each key of what the job's `show` gives.
  const facts = (row) => {
    const preview = data.previews[row];
    if (!preview) return [];
    const label = preview.label === undefined ? [] : [["label", preview.label]];
    return [...label, ...(preview.more || [])];
  };
  const fact = (row, key) => facts(row).find(([named]) => named === key)?.[1];
  const KINDS = 200; // more values than this are no kinds: search for them
  const COLOURS = 10;

  const filter = (() => {
    const form = get("filter-form");
    const rows = [...examples.index.keys()];
    const kinds = new Map(); // key -> value -> how many
    const wrong = new Set();
    let told = false; // whether examples say if they are wrong
    for (const row of rows) {
      const known = new Map(facts(row));
      for (const [key, value] of known) {
        if (!kinds.has(key)) kinds.set(key, new Map());
        kinds.get(key).set(value, (kinds.get(key).get(value) || 0) + 1);
      }
      const said = known.get("wrong");
      const predicted = known.get("predicted");
      told ||= said !== undefined || predicted !== undefined;
      if (said !== undefined ? said === "True" : predicted !== undefined && known.has("label")
        && predicted !== known.get("label")) wrong.add(row);
    }
    let chosen = { words: "", key: "", value: "", wrong: false };
    const self = {
      on: false, colour: null, changed: [], kinds,
      passes: (row) => (!chosen.words || name(row).toLowerCase().includes(chosen.words)
          || `#${examples.index[row]}` === chosen.words || String(examples.index[row]) === chosen.words)
        && (!chosen.value || fact(row, chosen.key) === chosen.value.slice(1))
        && (!chosen.wrong || wrong.has(row)),
    };
    if (!form) return self;
    get("filter").hidden = false;
    for (const [key, values] of kinds) {
      if (values.size > KINDS) continue;
      const option = element("option", "", key);
      option.value = key;
      form.key.append(option);
    }
    const choice = form.key.options.length > 1;
    for (const part of form.querySelectorAll(".by-value")) part.hidden = !choice;
    get("by-wrong").hidden = !told;

    function offer() {
      const every = element("option", "", "all");
      every.value = "";
      const values = [...(kinds.get(form.key.value) || [])].sort(([, a], [, b]) => b - a);
      const options = values.map(([value, count]) => {
        const option = element("option", "", `${value} (${count.toLocaleString("en")})`);
        option.value = `=${value}`; // also of an empty text
        return option;
      });
      form.value.replaceChildren(every, ...options);
      form.value.disabled = form.colour.disabled = !form.key.value;
      if (!form.key.value) form.colour.checked = false;
    }
    function legend() {
      const box = get("legend");
      box.replaceChildren();
      box.hidden = !self.colour;
      if (!self.colour) return;
      const values = [...kinds.get(self.colour)].sort(([, a], [, b]) => b - a).map(([value]) => value);
      const shown = values.slice(0, COLOURS)
        .sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
      self.places = new Map(shown.map((value, k) => [value, k]));
      shown.forEach((value, k) => {
        const item = element("li", "", value);
        item.style.setProperty("--dot", `var(--c${k})`);
        box.append(item);
      });
      if (values.length > COLOURS) {
        const item = element("li", "", `${(values.length - COLOURS).toLocaleString("en")} others`);
        item.style.setProperty("--dot", "var(--soft)");
        box.append(item);
      }
    }
    function changed() {
      chosen = {
        words: form.words.value.trim().toLowerCase(), key: form.key.value,
        value: form.value.value, wrong: form.wrong.checked,
      };
      self.on = Boolean(chosen.words || chosen.value || chosen.wrong);
      self.colour = form.colour.checked ? chosen.key : null;
      const many = rows.filter(self.passes).length.toLocaleString("en");
      const of = `${rows.length.toLocaleString("en")}${data.complete ? "" : " in this page"}`;
      get("filter-count").textContent = self.on ? `${many} of ${of} examples` : "";
      legend();
      rank();
      for (const tell of self.changed) tell();
    }
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => {
      if (event.target === form.key) offer();
      changed();
    });
    form.addEventListener("reset", () => setTimeout(() => { offer(); changed(); }));
    return self;
  })();
  rank();

  let referred = 0;
  function refer(which) {
    referred = which;
    const reference = data.references[which];
    const by = document.querySelector("input[name=measure]:checked")?.value || "cosines";
    const ends = by === "dots" && reference.dots ? reference.dots : reference;
    const word = ends === reference ? "cosine" : "inner product";
    for (const end of ["similar", "conflicting"]) {
      const rows = ends[end].map(([row]) => row);
      fill(get(`${end}-cards`), null, rows, ends[end].map(([, value]) => `${word} ${number(value)}`));
      if (!rows.length) get(`${end}-cards`).append(element("li", "extra", "There are none."));
    }
    if (get("reference-title")) get("reference-title").textContent = reference.name;
    if (!figures.cosines) return;
    get("reference-name").textContent = reference.name;
    const source = find("cosines", "cosines-bars");
    const old = { left: column(source, "left"), right: column(source, "right") };
    const { count, label } = reference.bars;
    source.data = { ...old, count, label };
    figures.cosines.y_range.end = 1.06 * Math.max(1, ...count);
  }
  for (const input of document.querySelectorAll("input[name=reference]")) {
    input.addEventListener("change", () => refer(Number(input.value)));
  }
  for (const input of document.querySelectorAll("input[name=measure]")) {
    input.addEventListener("change", () => refer(referred));
  }

  if (get("groups")) {
    const body = get("groups").tBodies[0];
    const order = [...body.rows];
    get("sort-groups").addEventListener("click", (event) => {
      const pressed = event.currentTarget.getAttribute("aria-pressed") !== "true";
      event.currentTarget.setAttribute("aria-pressed", pressed);
      const all = !get("groups-more") || get("groups-more").hidden;
      const share = (row) => Number(row.dataset.share) || 0;
      const sorted = pressed ? [...order].sort((a, b) => share(b) - share(a)) : order;
      sorted.forEach((row, k) => { row.hidden = !all && k >= 40; });
      body.append(...sorted);
    });
    get("groups-more")?.addEventListener("click", () => {
      for (const row of body.rows) row.hidden = false;
      get("groups-more").hidden = true;
    });
  }

  // --- figures ---------------------------------------------------------------------------------

  const find = (figure, named) => figures[figure].document.get_model_by_name(named);

  // Hovering a bar or the curve says in words what is there.
  function read(figure, sourceName) {
    const source = find(figure, sourceName);
    const line = get(`reading-${figure}`);
    const before = line.textContent;
    source.inspect.connect(() => {
      const found = source.inspected.indices[0] ?? source.inspected.line_indices?.[0];
      if (found === undefined) { line.textContent = before; return; }
      const label = column(source, "label")[found];
      const count = column(source, "count");
      if (!count) line.textContent = label;
      else {
        const many = count[found];
        line.textContent = `${label}: ${many.toLocaleString("en")} example${many === 1 ? "" : "s"}`;
      }
    });
    get(`figure-${figure}`).addEventListener("mouseleave", () => { line.textContent = before; });
  }

  function tabulate() {
    const box = get("tables");
    if (box.children.length) return;
    for (const [figure, title] of [["norms", "norm"], ["losses", "loss"]]) {
      if (!figures[figure]) continue;
      const source = find(figure, `${figure}-bars`);
      const table = element("table");
      const head = table.createTHead().insertRow();
      head.append(element("th", "", title), element("th", "n", "examples"));
      const body = table.createTBody();
      const counts = column(source, "count");
      column(source, "label").forEach((label, k) => {
        if (!counts[k]) return;
        const row = body.insertRow();
        row.append(element("td", "", label), element("td", "n", counts[k].toLocaleString("en")));
      });
      box.append(table);
    }
  }
  get("as-table")?.addEventListener("toggle", tabulate);

  // --- the plane: pointing, selecting, keys ----------------------------------------------------

  function plane() {
    const source = find("plane", "points");
    const rows = [...column(source, "row")];
    const xs = column(source, "x");
    const ys = column(source, "y");
    const cursor = find("plane", "cursor-point");
    const pane = get("figure-plane");
    const events = inside(pane, ".bk-events");
    const tools = { box: find("plane", "box"), lasso: find("plane", "lasso") };
    if (events) { // the plot is one stop of the tab key: this one, with keys of its own
      events.tabIndex = -1;
      events.style.outline = "none";
    }
    let at = null; // the point under the cursor

    function point(k) {
      at = k;
      cursor.data = k === null ? { x: [], y: [] } : { x: [xs[k]], y: [ys[k]] };
      if (k !== null) get("inspector").replaceChildren(details(rows[k]));
    }

    source.inspect.connect(() => {
      const found = source.inspected.indices.find((k) => filter.passes(rows[k]));
      if (found !== undefined && found !== at) point(found);
    });

    // Examples that do not pass fade, and cannot be pointed at or selected.
    const marks = figures.plane.renderers.find((drawn) => drawn.name === "mark");
    const strength = marks.glyph.fill_alpha.value;
    const weak = marks.nonselection_glyph.fill_alpha.value;
    function show() {
      const { on, colour } = filter;
      if (on || colour) {
        const style = getComputedStyle(document.documentElement);
        const soft = style.getPropertyValue("--soft").trim();
        const palette = [...Array(COLOURS).keys()].map((k) => style.getPropertyValue(`--c${k}`).trim());
        const place = (row) => filter.places.get(fact(row, colour));
        source.data = {
          x: xs, y: ys, row: column(source, "row"),
          alpha: rows.map((row) => (!on || filter.passes(row) ? Math.max(strength, on ? 0.8 : 0.7) : 0.06)),
          colour: rows.map((row) => (colour ? palette[place(row)] || soft : style.getPropertyValue("--mark").trim())),
        };
        for (const glyph of [marks.glyph, marks.nonselection_glyph]) {
          glyph.fill_alpha = { field: "alpha" };
          glyph.fill_color = { field: "colour" };
        }
      } else {
        marks.glyph.fill_alpha = { value: strength };
        marks.nonselection_glyph.fill_alpha = { value: weak };
        pergradPage.paint({ plane: figures.plane });
      }
      chosen();
    }
    filter.changed.push(show);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTimeout(() => {
      if (filter.on || filter.colour) show();
    }));

    function use(tool) {
      for (const [which, model] of Object.entries(tools)) {
        const active = which === tool;
        model.active = active;
        get(`tool-${which}`).setAttribute("aria-pressed", active);
      }
      if (events) events.style.touchAction = tool ? "none" : "pan-y pinch-zoom";
    }
    for (const which of Object.keys(tools)) {
      get(`tool-${which}`).addEventListener("click", () => use(tools[which].active ? null : which));
    }
    use(matchMedia("(pointer: coarse)").matches ? null : "box");

    // Selecting, by whichever means, ends here.
    let selected = [];
    function list() {
      selected.sort(orders[get("selection-order").value]);
      fill(get("selection-cards"), get("selection-more"), selected);
    }
    let asked = false; // a region was asked for by numbers: then say so if nothing is in it
    function chosen() {
      const picked = source.selected.indices.filter((k) => filter.passes(rows[k]));
      selected = picked.map((k) => rows[k]);
      get("selection").hidden = !selected.length && !asked;
      get("clear").disabled = !selected.length && !asked;
      get("copied").textContent = "";
      const some = data.complete ? "" : ` of the ${rows.length.toLocaleString("en")} in this page`;
      const count = selected.length;
      get("selection-count").textContent = count
        ? `${count.toLocaleString("en")} example${count === 1 ? "" : "s"} selected${some}`
        : `No example${some} is there`;
      list();
      if (picked.length === 1) point(picked[0]);
    }
    source.selected.properties.indices.change.connect(chosen);
    get("selection-order").addEventListener("change", list);
    const clear = () => { asked = false; source.selected.indices = []; chosen(); };
    get("clear").addEventListener("click", clear);

    get("region").addEventListener("submit", (event) => {
      event.preventDefault();
      const form = event.target;
      const bound = (field, open) => form[field].value === "" ? open : Number(form[field].value);
      const within = (what) => {
        const [from, to] = [bound(`${what}-from`, -Infinity), bound(`${what}-to`, Infinity)];
        return (row) => examples[what][row] >= from && examples[what][row] <= to;
      };
      const [loss, norm] = [within("loss"), within("norm")];
      asked = true;
      source.selected.indices = [...rows.keys()].filter((k) => loss(rows[k]) && norm(rows[k]));
      chosen();
      get("selection-count").focus();
    });

    get("copy").addEventListener("click", async () => {
      const text = selected.map((row) => examples.index[row]).join("\n");
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        const area = element("textarea");
        area.value = text;
        document.body.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
      }
      get("copied").textContent = `Copied ${selected.length.toLocaleString("en")}.`;
    });
    get("save").addEventListener("click", () => {
      // A spreadsheet would compute what begins like a formula: the apostrophe makes it text.
      const plain = (text) => (/^[=+\-@\t\r]/.test(text) ? `'${text}` : text);
      const quote = (value) => `"${plain(String(value ?? "")).replaceAll('"', '""')}"`;
      const head = ["index", ...(examples.key ? ["key"] : []), "loss", "norm", "label"];
      const lines = selected.map((row) => [
        examples.index[row], ...(examples.key ? [quote(examples.key[row])] : []),
        examples.loss[row], examples.norm[row], quote(data.previews[row]?.label),
      ].join(","));
      const file = new Blob([[head.join(","), ...lines].join("\n") + "\n"], { type: "text/csv" });
      const link = element("a");
      link.href = URL.createObjectURL(file);
      link.download = "examples.csv";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });

    const sorted = (values) => [...rows.keys()].sort((a, b) => values[a] - values[b] || a - b);
    const byLoss = sorted(xs);
    const byNorm = sorted(ys);
    pane.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [byLoss, 1], ArrowLeft: [byLoss, -1], ArrowUp: [byNorm, 1],
        ArrowDown: [byNorm, -1] }[event.key];
      if (step) {
        const [order, by] = step;
        const next = order.indexOf(at) + by;
        point(order[Math.min(order.length - 1, Math.max(0, next))]);
      } else if (event.key === "Home") point(byNorm[0]);
      else if (event.key === "End") point(byNorm[byNorm.length - 1]);
      else if (event.key === "Enter" && at !== null) open(rows[at]);
      else if (event.key === "Escape") clear();
      else return;
      event.preventDefault();
    });
    if (byNorm.length) point(byNorm[byNorm.length - 1]);
  }

  async function draw() {
    for (const [figure, item] of Object.entries(data.figures)) {
      const views = await Bokeh.embed.embed_item(item, `figure-${figure}`);
      figures[figure] = views.roots[0].model;
      const events = inside(get(`figure-${figure}`), ".bk-events");
      if (events) events.tabIndex = -1;
    }
    const paint = () => pergradPage.paint(figures);
    paint();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
    for (const figure of ["norms", "losses", "cosines"]) {
      if (figures[figure]) read(figure, `${figure}-bars`);
    }
    if (figures.curve) read("curve", "curve-line");
    if (figures.plane) plane();
    document.documentElement.dataset.ready = "yes";
    performance.mark("pergrad-ready");
  }
  if (data.references.length) refer(0);
  draw();
})();
