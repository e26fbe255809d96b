"use strict";
// The chain view: filter and sort the chains by a step effect, open one, link to it. Texts are only ever set as text.
cotfaith.data.then((data) => {
  const { byId, element, unpack, draw, forget } = cotfaith;
  const list = byId("chain-list");
  if (!list) return;
  const PAGE = 50;
  const pick = Object.fromEntries(["effect", "reader", "kind", "author", "order"].map((name) => [name, byId(`pick-${name}`)]));
  const blocks = [...document.querySelectorAll(".chain-data")];
  const unpacked = new Map();
  let shown = [], most = PAGE, current = null;

  function said(answer) {
    return answer === null ? "none at once" : answer ?? "–";
  }

  function digits(value) {
    return value === null || value === undefined ? "–" : value.toFixed(3).replace(/^-(0\.0*)$/, "$1");
  }

  function option(select, value, text) {
    const node = element("option", text);
    node.value = value;
    select.append(node);
  }

  // ---- colour of a value ----
  const stops = data.scale.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));

  function paint(node, value, limit) {
    if (value === null || value === undefined) return;
    const at = ((Math.max(-limit, Math.min(limit, value)) / limit + 1) / 2) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const rgb = stops[low].map((c, i) => Math.round(c + (stops[low + 1][i] - c) * (at - low)));
    node.style.background = `rgb(${rgb.join(",")})`;
    node.style.color = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140 ? "#111" : "#fff";
  }

  const effect = () => data.effects.find((one) => one.key === pick.effect.value);
  // A name like "constructor" is no member that every object has.
  const of = (table, name) => (table && Object.hasOwn(table, name) ? table[name] : undefined);
  const valuesOf = (chain, key, reader) => of(of(chain.effects, key), reader) ?? [];

  function largest(chain) {
    const found = valuesOf(chain, pick.effect.value, pick.reader.value).filter((value) => value !== null);
    return found.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), found.length ? found[0] : null);
  }

  // ---- the list ----
  function linkOf(chain) {
    return `#${new URLSearchParams({ chain: chain.chain_id, reader: pick.reader.value, effect: pick.effect.value })}`;
  }

  function rowOf({ chain, value }) {
    const row = element("tr"), name = element("td", null, "name"), link = element("a", chain.problem_id);
    link.href = linkOf(chain);
    if (chain === current) row.setAttribute("aria-current", "true");
    name.append(link);
    const strip = element("td", null, "strip"), one = effect();
    valuesOf(chain, pick.effect.value, pick.reader.value).forEach((step, j) => {
      const cell = element("i", j === chain.true_step ? "●" : null);
      cell.title = `step ${j + 1}: ${step === null ? "not measured" : digits(step)}`;
      paint(cell, step, one.limit);
      strip.append(cell);
    });
    const question = element("td", chain.question, "question-cell");
    row.append(name, element("td", chain.author), question, strip, element("td", digits(value), "n"));
    return row;
  }

  function isShown(chain, value, words) {
    const { kind, author } = pick, least = byId("least").valueAsNumber;
    if (kind.value === "apart" && !chain.apart.length) return false;
    if (kind.value === "differ" && new Set(Object.values(chain.answers)).size < 2) return false;
    if (author.value && chain.author !== author.value) return false;
    if (!Number.isNaN(least) && !(value !== null && Math.abs(value) >= least)) return false;
    const text = `${chain.problem_id} ${chain.question}`.toLowerCase();
    return words.every((word) => text.includes(word));
  }

  function showList() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    shown = data.chains.map((chain) => ({ chain, value: largest(chain) })).filter(({ chain, value }) => isShown(chain, value, words));
    const order = pick.order.value, size = ({ value }) => (value === null ? -Infinity : Math.abs(value));
    if (order === "down") shown.sort((a, b) => size(b) - size(a));
    if (order === "up") shown.sort((a, b) => (a.value === null) - (b.value === null) || size(a) - size(b));
    list.replaceChildren(...shown.slice(0, most).map(rowOf));
    byId("chain-count").textContent = `${shown.length} of ${data.chains.length} chains`;
    byId("more").hidden = shown.length <= most;
  }

  // ---- one chain ----
  async function detailOf(index) {
    if (!unpacked.has(index)) unpacked.set(index, await unpack(blocks[index]));
    return unpacked.get(index);
  }

  function textOf(step, tokens) {
    const cell = element("span", null, "step-text");
    if (!tokens || tokens.join("") !== step) {
      cell.textContent = step.trim();
      return cell;
    }
    tokens.forEach((token, k) => {
      const word = element("span", token, "token");
      word.title = `token ${k + 1} of ${tokens.length}: ${JSON.stringify(token)}`;
      cell.append(word);
    });
    return cell;
  }

  function showSteps(chain, detail) {
    const one = effect(), limit = one ? one.limit : 1;
    byId("scale-low").textContent = one ? `−${limit.toFixed(2)}` : "";
    byId("scale-high").textContent = one ? `+${limit.toFixed(2)}` : "";
    byId("scale-unit").textContent = one ? `${one.unit}: ${one.meaning}` : "no step effect was measured";
    const head = element("tr");
    head.append(element("th", "step"), ...data.readers.map((reader) => element("th", reader, "n")));
    byId("chain-head").replaceChildren(head);
    const values = Object.fromEntries(data.readers.map((reader) => [reader, valuesOf(chain, pick.effect.value, reader)]));
    const rows = detail.steps.map((step, j) => {
      const row = element("tr"), text = element("td", null, "text");
      text.append(element("span", `${j + 1}${j === chain.true_step ? " ●" : ""}  `), textOf(step, detail.tokens && detail.tokens[j]));
      paint(text, valuesOf(chain, pick.effect.value, pick.reader.value)[j], limit);
      row.append(text, ...data.readers.map((reader) => {
        const value = values[reader][j] ?? null, cell = element("td", digits(value), "n");
        paint(cell, value, limit);
        return cell;
      }));
      return row;
    });
    const answers = element("tr");
    answers.append(element("td", `${(detail.cue ?? "").trim()} …`, "text"));
    answers.append(...data.readers.map((reader) => element("td", said(of(chain.answers, reader)), "n")));
    byId("chain-steps").replaceChildren(...rows, answers);
    showArrows(chain);
  }

  function showArrows(chain) {
    const stage = document.querySelector(".stage"), rows = [...byId("chain-steps").rows];
    stage.querySelector("svg")?.remove();
    const values = valuesOf(chain, "direct", pick.reader.value), scale = data.effects.find((one) => one.key === "direct");
    byId("arrows-note").hidden = !scale || !values.some((value) => value);
    if (byId("arrows-note").hidden) return;
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const middle = (row) => row.offsetTop + row.offsetHeight / 2, end = middle(rows.at(-1));
    svg.setAttribute("class", "arrows");
    svg.setAttribute("viewBox", `0 0 60 ${stage.offsetHeight}`);
    svg.setAttribute("height", stage.offsetHeight);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `direct contribution of each step to the answer: ${values.map((v) => (v === null ? "none" : v.toFixed(2))).join(", ")} logits`);
    values.forEach((value, j) => {
      if (!value) return;
      const path = document.createElementNS(svg.namespaceURI, "path"), title = document.createElementNS(svg.namespaceURI, "title");
      const start = middle(rows[j]), reach = 12 + 44 * ((end - start) / (end - middle(rows[0]) || 1));
      path.setAttribute("d", `M 2 ${start} C ${reach} ${start}, ${reach} ${end}, 6 ${end}`);
      path.setAttribute("stroke", value > 0 ? "#2166ac" : "#b2182b");
      path.setAttribute("stroke-width", Math.max(0.75, 9 * Math.min(1, Math.abs(value) / scale.limit)));
      title.textContent = `step ${j + 1}: ${digits(value)} logits straight to the answer`;
      path.append(title);
      svg.append(path);
    });
    const tip = document.createElementNS(svg.namespaceURI, "path");
    tip.setAttribute("d", `M 9 ${end - 6} L 0 ${end} L 9 ${end + 6} Z`);
    tip.setAttribute("class", "tip");
    svg.append(tip);
    stage.append(svg);
  }

  function showCharts(place, groups, none) {
    place.querySelectorAll(".chart").forEach(forget);
    place.replaceChildren();
    for (const [text, group] of groups) {
      const grid = element("div", null, "grid");
      place.append(element("p", `${text}, colour from −${group.limit.toFixed(2)} to +${group.limit.toFixed(2)} logits`, "note"), grid);
      const nodes = group.charts.map((spec) => {
        const figure = element("figure"), caption = element("figcaption"), node = element("div", null, "chart");
        caption.append(element("span", spec.title));
        node.style.height = `${spec.height}px`;
        figure.append(caption, node);
        grid.append(figure);
        return node;
      });
      nodes.forEach((node, i) => draw(node, group.charts[i]));
    }
    if (!groups.length) place.append(element("p", none, "soft"));
  }

  function editRow(edit, detail) {
    const row = element("tr");
    row.append(element("td", edit.step === null ? "all" : edit.step + 1, "n"), element("td", edit.seed ?? "–", "n"));
    const text = element("td", null, "edit");
    edit.steps.forEach((step, j) => text.append(element(step === detail.steps[j] ? "span" : "mark", step)));
    if (!edit.steps.length) text.append(element("span", "(no step)", "soft"));
    row.append(text, ...data.readers.map((reader) => element("td", said(of(edit.answers, reader)), "n")));
    return row;
  }

  function showEdits(detail) {
    const groups = new Map();
    for (const edit of detail.edits) {
      const name = edit.variant ? `${edit.test}, ${edit.variant}` : edit.test;
      groups.set(name, [...(groups.get(name) || []), edit]);
    }
    const parts = [...groups].map(([name, edits]) => {
      const details = element("details"), summary = element("summary", `${name} `);
      summary.append(element("span", edits.length, "soft"));
      const scroll = element("div", null, "scroll"), table = element("table"), head = element("tr");
      head.append(element("th", "from step", "n"), element("th", "draw", "n"), element("th", "chain as read (changed steps underlined)"));
      head.append(...data.readers.map((reader) => element("th", reader, "n")));
      table.append(head, ...edits.map((edit) => editRow(edit, detail)));
      scroll.append(table);
      details.append(summary, scroll);
      return details;
    });
    byId("chain-edits").replaceChildren(...(parts.length ? parts : [element("p", "No edited text was kept.", "soft")]));
  }

  async function open(chain) {
    current = chain;
    const detail = await detailOf(data.chains.indexOf(chain));
    if (current !== chain) return;
    byId("chain-name").replaceChildren(element("bdi", chain.problem_id), ", chain of ", element("bdi", chain.author));
    byId("chain-question").textContent = detail.question ?? "";
    const apart = chain.apart.length ? `; behaviour and mechanism disagree (${chain.apart.join(", ")})` : "";
    byId("chain-gold").replaceChildren("gold answer: ", element("bdi", chain.gold ?? "–"), apart);
    showSteps(chain, detail);
    const maps = Object.entries(detail.maps).map(([variant, group]) => [`${variant}: change of the logit difference`, group]);
    showCharts(byId("chain-maps"), maps, "No patching of this chain.");
    showCharts(byId("chain-heads"), detail.heads ? [["direct contribution to the answer's logit", detail.heads]] : [], "No head by head attribution of this chain was kept.");
    showEdits(detail);
    showList();
  }

  function follow() {
    const asked = new URLSearchParams(location.hash.slice(1)), found = data.chains.find((chain) => chain.chain_id === asked.get("chain"));
    byId("chain-missing").hidden = Boolean(found) || !asked.has("chain");
    byId("chain-missing").textContent = `The chain “${asked.get("chain")}” is not in this report.`;
    if (!found) {
      if (asked.has("chain")) byId("chain-missing").scrollIntoView();
      return false;
    }
    if (data.readers.includes(asked.get("reader"))) pick.reader.value = asked.get("reader");
    if (data.effects.some((one) => one.key === asked.get("effect"))) pick.effect.value = asked.get("effect");
    open(found).then(() => {
      byId("chain").scrollIntoView();
      byId("chain").focus({ preventScroll: true });
    });
    return true;
  }

  function beside(by) {
    const at = shown.findIndex(({ chain }) => chain === current), next = shown[at + by];
    if (next) location.hash = linkOf(next.chain);
  }

  data.effects.forEach((one) => option(pick.effect, one.key, one.label));
  data.readers.forEach((reader) => option(pick.reader, reader, reader));
  [...new Set(data.chains.map((chain) => chain.author))].forEach((author) => option(pick.author, author, author));
  for (const node of [pick.kind, pick.author, pick.order, byId("least"), byId("search")]) node.addEventListener("input", showList);
  for (const node of [pick.effect, pick.reader]) node.addEventListener("input", () => open(current));
  byId("more").addEventListener("click", () => { most += PAGE; showList(); });
  byId("next").addEventListener("click", () => beside(1));
  byId("previous").addEventListener("click", () => beside(-1));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "j") beside(1);
    if (event.key === "k") beside(-1);
  });
  window.addEventListener("hashchange", follow);
  window.addEventListener("resize", () => { if (current) showArrows(current); });
  if (!follow() && data.chains.length) open(data.chains[0]);
});
