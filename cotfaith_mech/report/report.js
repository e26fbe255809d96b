"use strict";
// The page's behaviour: draws the charts, filters the estimates, shows one chain. Texts are only ever set as text.
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const byId = (id) => document.getElementById(id);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  function element(tag, text, className) {
    const node = document.createElement(tag);
    if (text !== undefined && text !== null) node.textContent = text;
    if (className) node.className = className;
    return node;
  }

  function said(answer) {
    return answer === null ? "none at once" : answer ?? "–";
  }

  // ---- charts ----
  function axis(own, ink, grid) {
    const title = { ...(own && own.title), standoff: 8 };
    return { automargin: true, gridcolor: grid, zerolinecolor: grid, linecolor: grid, fixedrange: true, ...own, title };
  }

  function layoutOf(spec) {
    const style = getComputedStyle(document.documentElement);
    const [ink, grid, page] = ["--ink", "--grid", "--page"].map((name) => style.getPropertyValue(name).trim());
    return {
      margin: { l: 48, r: 12, t: 12, b: 44 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: spec.data[0].type === "heatmap" ? "rgba(128,128,128,0.25)" : "rgba(0,0,0,0)",
      font: { color: ink, size: 12, family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif" },
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
    drawn.set(node, spec);
    resized.observe(node);
    const config = { displayModeBar: false };
    const traces = spec.data.map((trace) => ({ ...trace }));
    return Plotly.react(node, traces, layoutOf(spec), config).then(() => {
      if (!spec.id || !spec.id.startsWith("bridge") || node.dataset.bound) return;
      node.dataset.bound = "1";
      node.on("plotly_click", (event) => openChain(event.points[0].customdata, event.points[0].data.name));
    });
  }

  function drawPending() {
    document.querySelectorAll("[data-chart]").forEach((node) => {
      if (!drawn.has(node)) draw(node, data.charts[node.dataset.chart]);
    });
  }

  const seen = new IntersectionObserver(
    (entries) => entries.filter((e) => e.isIntersecting).forEach((e) => {
      seen.unobserve(e.target);
      if (!drawn.has(e.target)) draw(e.target, data.charts[e.target.dataset.chart]);
    }),
    { rootMargin: "600px" },
  );
  document.querySelectorAll("[data-chart]").forEach((node) => seen.observe(node));
  dark.addEventListener("change", () => drawn.forEach((spec, node) => draw(node, spec)));
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((node) => { node.open = true; });
    drawPending();
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

  // ---- one chain ----
  function colourOf(value, limit) {
    const stops = data.scale.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    const at = ((Math.max(-limit, Math.min(limit, value)) / limit + 1) / 2) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const rgb = stops[low].map((c, i) => Math.round(c + (stops[low + 1][i] - c) * (at - low)));
    const light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140;
    return { ground: `rgb(${rgb.join(",")})`, ink: light ? "#111" : "#fff" };
  }

  function paint(cell, value, limit) {
    if (value === null || value === undefined) return;
    const { ground, ink } = colourOf(value, limit);
    cell.style.background = ground;
    cell.style.color = ink;
  }

  const pickChain = byId("pick-chain"), pickEffect = byId("pick-effect"), pickReader = byId("pick-reader");

  function option(select, value, text) {
    const node = element("option", text);
    node.value = value;
    select.append(node);
  }

  function openChain(chainId, reader) {
    const index = data.chains.findIndex((chain) => chain.chain_id === chainId);
    if (index < 0) return;
    pickChain.value = String(index);
    if (data.readers.includes(reader)) pickReader.value = reader;
    showChain();
    byId("chains").scrollIntoView();
  }

  function showSteps(chain) {
    const effect = data.effects.find((e) => e.key === pickEffect.value);
    const values = (effect && chain.effects[effect.key]) || {};
    byId("scale-low").textContent = effect ? `−${effect.limit.toFixed(2)}` : "";
    byId("scale-high").textContent = effect ? `+${effect.limit.toFixed(2)}` : "";
    byId("scale-unit").textContent = effect ? `${effect.unit}: ${effect.meaning}` : "no step effect was measured";
    const head = element("tr");
    head.append(element("th", "step"), ...data.readers.map((reader) => element("th", reader, "n")));
    byId("chain-head").replaceChildren(head);
    const rows = chain.steps.map((step, j) => {
      const row = element("tr");
      const text = element("td", `${j + 1}${j === chain.true_step ? " ●" : ""}  ${step.trim()}`, "text");
      paint(text, values[pickReader.value] && values[pickReader.value][j], effect ? effect.limit : 1);
      row.append(text);
      for (const reader of data.readers) {
        const value = values[reader] ? values[reader][j] : null;
        const cell = element("td", value === null ? "–" : value.toFixed(3), "n");
        paint(cell, value, effect ? effect.limit : 1);
        row.append(cell);
      }
      return row;
    });
    const answers = element("tr");
    answers.append(element("td", `${chain.cue.trim()} …`, "text"));
    answers.append(...data.readers.map((reader) => element("td", said(chain.answers[reader]), "n")));
    byId("chain-steps").replaceChildren(...rows, answers);
  }

  function showMaps(chain) {
    byId("chain-maps").querySelectorAll(".chart").forEach((node) => { resized.unobserve(node); Plotly.purge(node); drawn.delete(node); });
    byId("chain-maps").replaceChildren();
    for (const [variant, group] of Object.entries(chain.maps)) {
      const grid = element("div", null, "grid");
      byId("chain-maps").append(
        element("p", `${variant}: change of the logit difference, colour from −${group.limit.toFixed(2)} to +${group.limit.toFixed(2)} logits`, "note"),
        grid,
      );
      const nodes = group.charts.map((spec) => {
        const figure = element("figure"), node = element("div", null, "chart");
        node.style.height = `${spec.height}px`;
        figure.append(element("figcaption", spec.title), node);
        grid.append(figure);
        return node;
      });
      nodes.forEach((node, i) => draw(node, group.charts[i]));
    }
    if (!Object.keys(chain.maps).length) byId("chain-maps").append(element("p", "No patching of this chain.", "soft"));
  }

  function editRow(edit, chain) {
    const row = element("tr");
    row.append(element("td", edit.step === null ? "all" : edit.step, "n"), element("td", edit.seed ?? "–", "n"));
    const text = element("td", null, "edit");
    edit.steps.forEach((step, j) => text.append(element(step === chain.steps[j] ? "span" : "mark", step)));
    if (!edit.steps.length) text.append(element("span", "(no step)", "soft"));
    row.append(text, ...data.readers.map((reader) => element("td", said(edit.answers[reader]), "n")));
    return row;
  }

  function showEdits(chain) {
    const groups = new Map();
    for (const edit of chain.edits) {
      const name = edit.variant ? `${edit.test}, ${edit.variant}` : edit.test;
      groups.set(name, [...(groups.get(name) || []), edit]);
    }
    const parts = [...groups].map(([name, edits]) => {
      const details = element("details"), summary = element("summary", `${name} `);
      summary.append(element("span", edits.length, "soft"));
      const scroll = element("div", null, "scroll"), table = element("table"), head = element("tr");
      head.append(element("th", "step", "n"), element("th", "draw", "n"), element("th", "chain as read (changed steps underlined)"));
      head.append(...data.readers.map((reader) => element("th", reader, "n")));
      table.append(head, ...edits.map((edit) => editRow(edit, chain)));
      scroll.append(table);
      details.append(summary, scroll);
      return details;
    });
    byId("chain-edits").replaceChildren(...(parts.length ? parts : [element("p", "No edited text was kept.", "soft")]));
  }

  function showChain() {
    const chain = data.chains[Number(pickChain.value)];
    byId("chain-question").textContent = chain.question ?? "";
    byId("chain-gold").textContent = `gold answer: ${chain.gold ?? "–"}`;
    showSteps(chain);
    showMaps(chain);
    showEdits(chain);
  }

  if (pickChain && data.chains.length) {
    data.effects.forEach((effect) => option(pickEffect, effect.key, effect.label));
    data.readers.forEach((reader) => option(pickReader, reader, reader));
    pickChain.addEventListener("change", showChain);
    for (const select of [pickEffect, pickReader]) {
      select.addEventListener("change", () => showSteps(data.chains[Number(pickChain.value)]));
    }
    document.querySelectorAll("[data-chain-link]").forEach((link) => link.addEventListener("click", (event) => {
      event.preventDefault();
      openChain(link.dataset.chainLink, link.dataset.reader);
    }));
    showChain();
  }
})();
