"use strict";
// What the page of a run does: draws the figures, and says in words what is pointed at.
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { column, inside } = pergradPage;
  const figures = {};
  for (const [name, item] of Object.entries(data.figures)) {
    const views = await Bokeh.embed.embed_item(item, `figure-${name}`);
    figures[name] = views.roots[0].model;
    const pane = document.getElementById(`figure-${name}`);
    const events = inside(pane, ".bk-events");
    if (events) { events.tabIndex = -1; events.style.touchAction = "pan-y pinch-zoom"; }
    const reading = document.getElementById(`reading-${name}`);
    const before = reading.textContent;
    for (const kind of ["line", "marks"]) { // marks last: a dot is told rather than the line
      const source = figures[name].document.get_model_by_name(`${name}-${kind}`);
      if (!source) continue;
      source.inspect.connect(() => {
        const at = source.inspected.indices[0] ?? source.inspected.line_indices?.[0];
        if (at !== undefined) reading.textContent = column(source, "label")[at];
      });
    }
    pane.addEventListener("mouseleave", () => { reading.textContent = before; });
  }
  const paint = () => pergradPage.paint(figures);
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  for (const image of document.querySelectorAll(".picture img")) {
    if (Math.max(image.naturalWidth, image.naturalHeight) <= 64) image.className = "tiny";
  }
  document.documentElement.dataset.ready = "yes";
})();
