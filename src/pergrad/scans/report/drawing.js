"use strict";
// What the scripts of all pages have in common: making elements, writing numbers, painting figures
// in the colours of the style sheet.
const pergradPage = (() => {
  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function number(value) {
    if (typeof value !== "number") return String(value ?? "–");
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e-3 && size < 1e6) {
      return Number(value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 9 });
    }
    const [digits, power] = value.toExponential(2).split("e");
    const raised = [...String(Number(power))].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
    return `${Number(digits)}×10${raised.join("")}`;
  }

  function percent(share) {
    if (typeof share !== "number") return null;
    if (share === 0) return "0 %";
    if (share < 0.00001) return "under 0.001 %";
    return `${Number((100 * share).toPrecision(2))} %`;
  }

  const column = (source, named) =>
    source.data instanceof Map ? source.data.get(named) : source.data[named];

  function paint(figures) {
    const style = getComputedStyle(document.documentElement);
    const colour = (role) => style.getPropertyValue(`--${role}`).trim();
    const [ink, soft, line] = ["ink", "soft", "line"].map(colour);
    for (const figure of Object.values(figures)) {
      for (const axis of [...figure.below, ...figure.left]) {
        axis.setv({
          axis_label_text_color: soft, axis_label_text_font: "system-ui, sans-serif",
          axis_label_text_font_style: "normal", axis_label_text_font_size: "13px",
          major_label_text_color: soft, major_label_text_font: "system-ui, sans-serif",
          major_label_text_font_size: "12px", axis_line_color: line, major_tick_line_color: line,
          minor_tick_line_color: null,
        });
      }
      for (const part of figure.center) {
        if ("grid_line_color" in part.attributes) part.grid_line_color = line;
        else if (part.name === "guide") part.line_color = soft;
      }
      for (const drawn of figure.renderers) {
        const looks = {
          mark: { fill_color: colour("mark") }, bar: { fill_color: colour("bar"), line_color: colour("card") },
          density: { fill_color: soft }, line: { line_color: colour("bar") },
          area: { fill_color: colour("bar") }, cursor: { line_color: ink },
          outlier: { fill_color: colour("picked") }, batch: { line_color: colour("picked") },
          heat: { fill_color: colour("mark") },
        }[drawn.name] || {};
        const glyphs = [drawn.glyph, drawn.selection_glyph, drawn.nonselection_glyph, drawn.hover_glyph];
        for (const glyph of glyphs) {
          if (!glyph || !glyph.attributes) continue;
          for (const [property, value] of Object.entries(looks)) {
            const picked = drawn.name === "mark" && glyph === drawn.selection_glyph;
            glyph[property] = drawn.name === "area" ? value : { value: picked ? colour("picked") : value };
          }
        }
      }
    }
  }

  function inside(root, selector) {
    const found = root.querySelector(selector);
    if (found) return found;
    for (const child of root.querySelectorAll("*")) {
      const deep = child.shadowRoot && inside(child.shadowRoot, selector);
      if (deep) return deep;
    }
    return null;
  }

  return { element, number, percent, column, paint, inside };
})();
