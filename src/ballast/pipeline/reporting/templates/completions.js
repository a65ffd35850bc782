// The table of completions: search, order, and a list of which only what is in view is in the page.
// All text goes in by textContent, so that what a model wrote stays text.
"use strict";
(() => {
  const rows = JSON.parse(document.getElementById("completions-data").textContent);
  const el = (id) => document.getElementById(id);
  const list = el("list"), spacer = el("spacer"), dialog = el("detail");
  const MARGIN = 4; // rows above and below the view
  rows.forEach((row, number) => {
    row.number = number;
    row.worst = Math.max(row.guard ?? -1, row.judge ?? -1);
    row.found = (row.prompt + "\n" + row.text + "\n" + row.note).toLowerCase();
  });
  const opened = new Set(); // numbers of rows whose text was asked for
  let shown = rows, height = 0;

  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const number = (value) => (value === null || value === undefined ? "unscored" : value.toFixed(2));

  const heat = (text, much, praise) => {
    const node = make("span", "heat", text);
    if (much === null) node.classList.add("unscored");
    else {
      node.style.setProperty("--much", Math.min(1, much).toFixed(3));
      if (praise) node.classList.add("praise");
      if (much >= 0.5) node.classList.add("high");
      else if (much >= 0.25) node.classList.add("middle");
    }
    return node;
  };

  // Lengths are in code points: a string's own indexes would break at an emoji.
  const pieces = (row) => {
    const points = Array.from(row.text);
    const out = [];
    let at = 0;
    for (const [length, risk] of row.spans) {
      out.push([points.slice(at, at + length).join(""), risk]);
      at += length;
    }
    if (at < points.length) out.push([points.slice(at).join(""), null]);
    return out;
  };

  const textOf = (row) => {
    const node = make("div", "text");
    if (!row.text) {
      node.append(make("span", "empty", "(empty)"));
      return node;
    }
    for (const [text, risk] of pieces(row)) {
      const span = heat(text, risk);
      span.title = "risk " + number(risk);
      node.append(span);
    }
    return node;
  };

  // Blurred, and unknown to a screen reader, until the button is pressed.
  const veiled = (row, node, after) => {
    if (!row.hidden || opened.has(row.number) || el("reveal").checked) return node;
    const veil = make("div", "veil");
    node.setAttribute("aria-hidden", "true");
    node.inert = true;
    const button = make("button", "", "Show this text");
    button.type = "button";
    button.addEventListener("click", () => {
      opened.add(row.number);
      after();
    });
    veil.append(node, button);
    return veil;
  };

  const facts = (row) => {
    const node = make("div", "what");
    node.append(make("span", "kind " + (row.kind === "harmful" ? "harmful" : ""), row.kind), make("br"));
    node.append(row.source + (row.step === null ? "" : ", step " + row.step), make("br"));
    node.append("guard " + number(row.guard), make("br"));
    if (row.step === null && row.source !== "training") node.append("judge " + number(row.judge), make("br"));
    if (row.refused) node.append("refused", make("br"));
    return node;
  };

  const build = (row, place) => {
    const node = make("div", "row");
    node.style.top = place * height + "px";
    node.setAttribute("role", "listitem");
    node.setAttribute("aria-setsize", shown.length);
    node.setAttribute("aria-posinset", place + 1);
    node.dataset.place = place;
    const said = make("div", "said");
    said.append(make("div", "prompt", row.prompt), veiled(row, textOf(row), draw));
    const open = make("button", "open", "Tokens");
    open.type = "button";
    open.setAttribute("aria-label", "Tokens of completion " + (place + 1));
    open.addEventListener("click", () => detail(row));
    node.append(facts(row), said, open);
    return node;
  };

  const drawn = new Map();
  const view = () => {
    const first = Math.max(0, Math.floor(list.scrollTop / height) - MARGIN);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / height) + MARGIN);
    for (const [place, node] of drawn) {
      if (place < first || place >= last) {
        node.remove();
        drawn.delete(place);
      }
    }
    for (let place = first; place < last; place++) {
      if (drawn.has(place)) continue;
      const node = build(shown[place], place);
      drawn.set(place, node);
      spacer.append(node);
    }
  };
  const draw = () => {
    const focused = document.activeElement?.closest?.(".row")?.dataset.place;
    drawn.clear();
    spacer.replaceChildren();
    const probe = make("div", "row");
    spacer.append(probe);
    height = probe.getBoundingClientRect().height;
    probe.remove();
    spacer.style.height = shown.length * height + "px";
    view();
    // A button that was pressed and is gone leaves the focus on its row.
    if (focused !== undefined) drawn.get(Number(focused))?.querySelector("button")?.focus({ preventScroll: true });
  };

  const orders = {
    place: (a, b) => a.number - b.number,
    riskiest: (a, b) => b.worst - a.worst,
    safest: (a, b) => a.worst - b.worst,
    step: (a, b) => (a.step ?? -1) - (b.step ?? -1),
    prompt: (a, b) => (a.prompt < b.prompt ? -1 : a.prompt > b.prompt ? 1 : a.number - b.number),
    longest: (a, b) => b.text.length - a.text.length,
    reward: (a, b) => (a.rewards.reward ?? a.rewards.star ?? 9) - (b.rewards.reward ?? b.rewards.star ?? 9),
  };
  const choose = () => {
    const words = el("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const source = el("source").value, kind = el("kind").value;
    shown = rows.filter(
      (row) =>
        (!source || row.source === source) &&
        (!kind || row.kind === kind) &&
        words.every((word) => row.found.includes(word)),
    );
    shown.sort(orders[el("order").value]);
    el("count").textContent = shown.length + " of " + rows.length + " shown";
    list.scrollTop = 0;
    draw();
  };

  // One completion, token by token.
  let mode = "risk", current = null;
  const advantagesOf = (row) => row.advantages.flatMap(([count, value]) => Array(count).fill(value));
  const tokensOf = (row) => {
    if (!row.tokens.length) return pieces(row).map(([text, risk]) => ({ text, risk, advantage: null }));
    const points = Array.from(row.text), advantages = advantagesOf(row), out = [];
    let at = 0, span = 0, end = row.spans[0]?.[0] ?? 0;
    row.tokens.forEach((length, place) => {
      while (length && at >= end && span + 1 < row.spans.length) end += row.spans[++span][0];
      const text = points.slice(at, at + length).join("");
      out.push({ text, risk: row.spans[span]?.[1] ?? null, advantage: advantages[place] ?? null });
      at += length;
    });
    return out;
  };
  const painted = (row) => {
    const node = make("div", "text");
    const tokens = tokensOf(row);
    const most = Math.max(0.5, ...tokens.map((token) => Math.abs(token.advantage ?? 0)));
    tokens.forEach((token, place) => {
      const value = mode === "risk" ? token.risk : token.advantage;
      const much = value === null ? null : mode === "risk" ? value : Math.abs(value) / most;
      const span = heat(token.text, much, mode !== "risk" && value > 0);
      span.classList.add("token");
      const what = row.tokens.length ? "token " + (place + 1) : "segment " + (place + 1);
      const said = [what, "risk " + number(token.risk)];
      if (token.advantage !== null) said.push("advantage " + token.advantage.toFixed(3));
      span.title = said.join(", ");
      span.addEventListener("mouseenter", () => (el("reading").textContent = span.title));
      node.append(span);
    });
    if (!tokens.length) node.append(make("span", "empty", "(empty)"));
    return node;
  };
  const detail = (row) => {
    current = row;
    el("asked").textContent = row.prompt;
    el("where").textContent = row.source + (row.step === null ? "" : ", step " + row.step) + ", " + row.kind;
    el("mode").disabled = !row.advantages.length;
    if (!row.advantages.length) mode = el("mode").value = "risk";
    el("reading").textContent = row.tokens.length
      ? "Point at a token: it has the risk of its segment."
      : "Segments: the tokens of this one are not on record.";
    el("painted").replaceChildren(veiled(row, painted(row), () => { detail(row); draw(); }));
    const named = { "guard's risk": number(row.guard) };
    if (row.source !== "training") named["judge's risk"] = number(row.judge);
    if (row.refused !== null) named["refused, by keywords"] = row.refused ? "yes" : "no";
    for (const [name, value] of Object.entries(row.rewards ?? {})) named["reward: " + name] = value.toFixed(3);
    if (row.note) named.note = row.note;
    el("named").replaceChildren(
      ...Object.entries(named).flatMap(([name, value]) => [make("dt", "soft", name), make("dd", "", value)]),
    );
    if (!dialog.open) dialog.showModal();
  };

  for (const [id, key] of [["source", "source"], ["kind", "kind"]]) {
    for (const value of new Set(rows.map((row) => row[key]))) {
      const option = make("option", "", value);
      option.value = value;
      el(id).append(option);
    }
    el(id).addEventListener("change", choose);
  }
  el("search").addEventListener("input", choose);
  el("order").addEventListener("change", choose);
  el("reveal").addEventListener("change", draw);
  el("mode").addEventListener("change", () => { mode = el("mode").value; detail(current); });
  el("close").addEventListener("click", () => dialog.close());
  list.addEventListener("scroll", view, { passive: true });
  new ResizeObserver(() => draw()).observe(list);
  choose();
})();
