"use strict";
// Draws the charts and saves them; filters the estimates. Texts are only ever set as text.
const cotfaith = (() => {
  const byId = (id) => document.getElementById(id);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";
  const PAPER = { ink: "#1d1f21", grid: "#e6e6e2", page: "#ffffff" };

  function element(tag, text, className) {
    const node = document.createElement(tag);
    if (text !== undefined && text !== null) node.textContent = text;
    if (className) node.className = className;
    return node;
  }

  function bytes(base64) {
    return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  }

  async function unpack(node) {
    const stream = new Blob([bytes(node.textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  const data = unpack(byId("page-data"));

  // ---- drawing ----
  function axis(own, ink, grid) {
    const title = { ...(own && own.title), standoff: 8 };
    return { automargin: true, gridcolor: grid, zerolinecolor: grid, linecolor: grid, fixedrange: true, ...own, title };
  }

  function pageColours() {
    const style = getComputedStyle(document.documentElement);
    const [ink, grid, page] = ["--ink", "--grid", "--page"].map((name) => style.getPropertyValue(name).trim());
    return { ink, grid, page };
  }

  function layoutOf(spec, { ink, grid, page }) {
    return {
      margin: { l: 48, r: 12, t: 12, b: 44 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: spec.data[0].type === "heatmap" ? "rgba(128,128,128,0.25)" : "rgba(0,0,0,0)",
      font: { color: ink, size: 12, family: FONT },
      hoverlabel: { bgcolor: page, bordercolor: ink, font: { color: ink }, align: "left" },
      dragmode: false,
      ...spec.layout,
      legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0, ...spec.layout.legend },
      xaxis: axis(spec.layout.xaxis, ink, grid),
      yaxis: axis(spec.layout.yaxis, ink, grid),
    };
  }

  const drawn = new Map();
  const resized = new ResizeObserver((entries) => entries.forEach((e) => {
    const { width } = e.contentRect, full = e.target._fullLayout;
    if (width && full && Math.abs(full.width - width) > 1) Plotly.relayout(e.target, { width });
  }));

  function draw(node, spec) {
    if (!drawn.has(node)) addSaving(node, spec);
    drawn.set(node, spec);
    resized.observe(node);
    const traces = spec.data.map((trace) => ({ ...trace }));
    return Plotly.react(node, traces, layoutOf(spec, pageColours()), { displayModeBar: false }).then(() => {
      if (!spec.id || !spec.id.startsWith("bridge") || node.dataset.bound) return;
      node.dataset.bound = "1";
      node.on("plotly_click", ({ points: [point] }) => {
        const link = new URLSearchParams({ chain: point.customdata, reader: point.data.name });
        location.hash = link.toString();
      });
    });
  }

  function forget(node) {
    resized.unobserve(node);
    Plotly.purge(node);
    drawn.delete(node);
  }

  // ---- saving: PNG as drawn, on white; the paper figure as PDF, or this figure alone to the printer; values as CSV ----
  function plain(text) {
    const page = new DOMParser().parseFromString(String(text).replaceAll("<br>", " "), "text/html");
    return page.body.textContent;
  }

  function offer(blob, name) {
    const link = element("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function nameOf(spec) {
    return `${spec.id || "chain"} ${spec.title}`.replace(/[^\p{L}\p{N}]+/gu, "_").replace(/^_|_$/g, "");
  }

  function savePng(node, spec) {
    const layout = { ...layoutOf(spec, PAPER), width: node.clientWidth, height: spec.height + 40, paper_bgcolor: "#fff" };
    layout.title = { text: spec.title, x: 0.02, font: { size: 14 } };
    layout.margin = { ...layout.margin, t: layout.margin.t + (spec.data.length > 1 ? 66 : 40) };
    const traces = spec.data.map((trace) => (trace.type === "heatmap" ? { ...trace, showscale: true } : { ...trace }));
    return Plotly.downloadImage({ data: traces, layout }, { format: "png", scale: 3, filename: nameOf(spec), width: layout.width, height: layout.height });
  }

  function savePdf(node, spec) {
    const paper = [...document.querySelectorAll("[data-pdf]")].find((block) => block.dataset.pdf === spec.pdf);
    if (paper) {
      offer(new Blob([bytes(paper.textContent)], { type: "application/pdf" }), `${spec.pdf}.pdf`);
      return;
    }
    const figure = node.closest("figure");
    document.body.classList.add("print-one");
    figure.classList.add("printed");
    window.print();
    figure.classList.remove("printed");
    document.body.classList.remove("print-one");
  }

  function rowsOf(spec) {
    const named = (own, other) => plain((own && own.title && own.title.text) || other);
    const x = named(spec.layout.xaxis, "x"), y = named(spec.layout.yaxis, "y");
    if (spec.data[0].type === "heatmap") {
      const [map] = spec.data, { ticktext, tickvals } = spec.layout.yaxis;
      const labels = new Map((tickvals || []).map((value, i) => [value, ticktext[i]]));
      const rows = map.z.flatMap((row, i) => row.map((value, j) => [
        labels.get(map.y[i]) ?? map.y[i], map.x[j], value, plain(map.text[i][j]),
      ]));
      return [[y === "y" ? "row" : y, x, "value", "site"], ...rows];
    }
    const rows = [["series", x, y, "interval_low", "interval_high", "problems", "label"]];
    for (const trace of spec.data.filter((one) => one.hoverinfo !== "skip")) {
      const ys = Array.isArray(trace.y[0]) ? trace.y[0].map((_, i) => trace.y.map((level) => level[i]).join(" ")) : trace.y;
      ys.forEach((value, i) => {
        const more = trace.customdata && trace.customdata[i];
        const [low, high, n] = Array.isArray(more) ? more : [];
        rows.push([trace.name ?? "", trace.x[i], value, low, high, n, trace.text && trace.text[i]].map((cell) => (typeof cell === "string" ? plain(cell) : cell)));
      });
    }
    return rows;
  }

  function csv(rows) {
    const cell = (value) => (/[",\n]/.test(value ?? "") ? `"${String(value).replaceAll('"', '""')}"` : value ?? "");
    return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
  }

  function addSaving(node, spec) {
    const place = node.parentElement.querySelector("figcaption"), bar = element("span", null, "save");
    const kinds = {
      PNG: () => savePng(node, spec),
      PDF: () => savePdf(node, spec),
      CSV: () => offer(new Blob([csv(rowsOf(spec))], { type: "text/csv" }), `${nameOf(spec)}.csv`),
    };
    for (const [kind, save] of Object.entries(kinds)) {
      const button = element("button", kind);
      button.type = "button";
      button.title = `${spec.title || "this figure"} as ${kind}`;
      button.setAttribute("aria-label", button.title);
      button.addEventListener("click", save);
      bar.append(button);
    }
    place.append(bar);
  }

  data.then(({ charts }) => {
    const places = document.querySelectorAll("[data-chart]");
    const pending = () => places.forEach((node) => drawn.has(node) || draw(node, charts[node.dataset.chart]));
    const seen = new IntersectionObserver(
      (entries) => entries.filter((e) => e.isIntersecting).forEach(({ target }) => {
        seen.unobserve(target);
        if (!drawn.has(target)) draw(target, charts[target.dataset.chart]);
      }),
      { rootMargin: "600px" },
    );
    places.forEach((node) => seen.observe(node));
    dark.addEventListener("change", () => drawn.forEach((spec, node) => draw(node, spec)));
    window.addEventListener("beforeprint", () => {
      if (document.body.classList.contains("print-one")) return;
      document.querySelectorAll("details").forEach((node) => { node.open = true; });
      pending();
    });
  });

  // ---- filter of the estimates ----
  const filter = byId("filter");
  if (filter) filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    document.querySelectorAll(".group").forEach((group) => {
      let inGroup = 0;
      group.querySelectorAll(".estimate").forEach((row) => {
        const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        inGroup += row.hidden ? 0 : 1;
      });
      group.hidden = inGroup === 0;
      group.open = words.length > 0 && inGroup > 0;
      shown += inGroup;
    });
    byId("filter-count").textContent = words.length ? `${shown} estimates` : "";
  });

  return { byId, element, unpack, data, draw, forget };
})();
