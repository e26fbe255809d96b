"use strict";
// Draws the charts and saves them; filters the estimates. Texts are only ever set as text, and the page's policy has the
// browser refuse whatever would read one as markup: what passes holds no tag, as plotly's own uses do not.
window.trustedTypes?.createPolicy("default", { createHTML: (text) => (text.includes("<") ? null : text) });
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
      hoverlabel: { bgcolor: page, bordercolor: ink, font: { color: ink }, align: "left", namelength: -1 },
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
      if (!spec.id.startsWith("bridge") || node.dataset.bound) return;
      node.dataset.bound = "1";
      node.on("plotly_click", ({ points: [point] }) => {
        const link = new URLSearchParams({ chain: point.customdata, reader: point.data.meta });
        location.hash = link.toString();
      });
    });
  }

  function forget(node) {
    resized.unobserve(node);
    Plotly.purge(node);
    drawn.delete(node);
  }

  // ---- saving: PNG as drawn, on white; the paper figure as PDF, or this picture where there is none; values as CSV ----
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

  // Letters and digits; a file system takes 255 bytes, so of a longer name the two ends.
  function nameOf(spec) {
    const name = `${spec.id} ${spec.title}`.replace(/[^\p{L}\p{N}]+/gu, "_").replace(/^_|_$/g, ""), letters = [...name];
    const long = new TextEncoder().encode(name).length > 240;
    return long ? [...letters.slice(0, 40), "_", ...letters.slice(-19)].join("") : name;
  }

  // The figure on white paper, with the title and the colour bars that the page writes around it.
  function pictureOf(node, spec) {
    const layout = { ...layoutOf(spec, PAPER), width: node.clientWidth, height: spec.height + 40, paper_bgcolor: "#fff" };
    layout.title = { text: spec.heading, x: 0.02, font: { size: 14 } };
    layout.margin = { ...layout.margin, t: layout.margin.t + (spec.data.length > 1 ? 66 : 40) };
    const data = spec.data.map((trace) => (trace.type === "heatmap" ? { ...trace, showscale: true } : { ...trace }));
    return [{ data, layout }, { scale: 3, width: layout.width, height: layout.height }];
  }

  function savePng(node, spec) {
    const [picture, size] = pictureOf(node, spec);
    return Plotly.downloadImage(picture, { ...size, format: "png", filename: nameOf(spec) });
  }

  // A PDF of one page that a JPEG picture fills; a pixel of the screen is 3/4 of a point.
  function pdfOf(jpeg, { width, height, scale }) {
    const place = `${width * 0.75} 0 0 ${height * 0.75} 0 0 cm /F Do`, parts = ["%PDF-1.4\n"], starts = [];
    const length = () => parts.reduce((sum, part) => sum + part.length, 0);
    const objects = [
      ["<< /Type /Catalog /Pages 2 0 R >>"],
      ["<< /Type /Pages /Kids [3 0 R] /Count 1 >>"],
      [`<< /Type /Page /Parent 2 0 R /MediaBox [0 0 ${width * 0.75} ${height * 0.75}] /Contents 4 0 R /Resources << /XObject << /F 5 0 R >> >> >>`],
      [`<< /Length ${place.length} >>\nstream\n`, place, "\nendstream"],
      [`<< /Type /XObject /Subtype /Image /Width ${width * scale} /Height ${height * scale} /ColorSpace /DeviceRGB /BitsPerComponent 8 /Filter /DCTDecode /Length ${jpeg.length} >>\nstream\n`, jpeg, "\nendstream"],
    ];
    objects.forEach((object, i) => {
      starts.push(length());
      parts.push(`${i + 1} 0 obj\n`, ...object, "\nendobj\n");
    });
    const end = length(), rows = starts.map((start) => `${String(start).padStart(10, "0")} 00000 n \n`);
    parts.push(`xref\n0 6\n0000000000 65535 f \n${rows.join("")}trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n${end}\n%%EOF\n`);
    return new Blob(parts, { type: "application/pdf" });
  }

  async function savePdf(node, spec) {
    const paper = [...document.querySelectorAll("[data-pdf]")].find((block) => block.dataset.pdf === spec.pdf);
    if (paper) {
      offer(new Blob([bytes(paper.textContent)], { type: "application/pdf" }), `${spec.pdf}.pdf`);
      return;
    }
    const [picture, size] = pictureOf(node, spec);
    const jpeg = await Plotly.toImage(picture, { ...size, format: "jpeg" });
    offer(pdfOf(bytes(jpeg.split(",")[1]), size), `${nameOf(spec)}.pdf`);
  }

  // Of every map the same columns; what a map does not have stays empty.
  function rowsOfMap(spec, x, y) {
    const [map] = spec.data, more = ["ci_low", "ci_high", "n", "recovered", "site", "text"];
    const rows = map.z.flatMap((row, i) => row.map((value, j) => [
      spec.rows[i], map.x[j], value, spec.unit, ...more.map((name) => spec.cells[name]?.[i][j]),
    ].map((cell) => (typeof cell === "string" ? plain(cell) : cell))));
    return [[y === "y" ? "row" : y, x, "value", "unit", ...more], ...rows];
  }

  function rowsOf(spec) {
    const named = (own, other) => plain((own && own.title && own.title.text) || other);
    const x = named(spec.layout.xaxis, "x"), y = named(spec.layout.yaxis, "y");
    if (spec.data[0].type === "heatmap") return rowsOfMap(spec, x, y);
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

  // A spreadsheet would compute a text that begins like a formula: an apostrophe keeps it text. Numbers stay as they are.
  function inert(value) {
    const formula = typeof value === "string" && /^[=+\-@\uFF1D\uFF0B\uFF0D\uFF20]/.test(value) && Number.isNaN(Number(value));
    return formula ? `'${value}` : value ?? "";
  }

  function csv(rows) {
    const cell = (value) => (/[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value);
    return rows.map((row) => row.map(inert).map(cell).join(",")).join("\n") + "\n";
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
