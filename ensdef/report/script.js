"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const narrow = window.matchMedia("(max-width: 40rem)");

  // what comes from records enters the page through here, as text and never as markup
  function element(name, { text, className, ...attributes } = {}, ...children) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function definitions(pairs) {
    const entries = pairs.map(([name, value]) => [element("dt", { text: name }), element("dd", { text: value })]);
    return element("dl", {}, ...entries.flat());
  }

  function setUpThemes() {
    const key = "ensdef-report-theme";
    const group = document.querySelector(".theme");
    const choose = (theme) => {
      if (theme === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = theme;
      for (const button of group.querySelectorAll("button")) {
        button.setAttribute("aria-pressed", String(button.dataset.theme === theme));
      }
    };
    // a page opened from disk may have no storage; the choice then lasts until it is closed
    let kept = null;
    try {
      kept = window.localStorage.getItem(key);
    } catch {
      kept = null;
    }
    choose(["light", "dark"].includes(kept) ? kept : "auto");
    group.hidden = false;
    group.addEventListener("click", ({ target }) => {
      if (!target.dataset.theme) return;
      choose(target.dataset.theme);
      try {
        window.localStorage.setItem(key, target.dataset.theme);
      } catch {
        kept = null;
      }
    });
  }

  const tip = document.getElementById("tip");
  function showTip(handler, event, item, value) {
    tip.hidden = value === null || value === undefined || value === "";
    if (tip.hidden) return;
    tip.replaceChildren(definitions(Object.entries(value).map(([name, told]) => [name, String(told)])));
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, window.innerWidth - width - 8);
    const below = event.clientY + 14;
    tip.style.left = `${Math.max(left, 8)}px`;
    tip.style.top = `${below + height > window.innerHeight ? event.clientY - height - 10 : below}px`;
  }

  const drawn = new Map();
  async function draw(plot) {
    const config = structuredClone(data.config);
    config.legend.columns = narrow.matches ? 1 : 3;
    config.axisY = { labelLimit: narrow.matches ? 110 : 240 };
    await window.vegaEmbed(plot, structuredClone(data.figures[plot.dataset.figure]), {
      mode: "vega-lite",
      renderer: "svg",
      ast: true, // expressions are interpreted: the page's policy forbids making code of text
      actions: false,
      defaultStyle: false,
      tooltip: showTip,
      config,
    });
    plot.classList.add("drawn");
  }

  // a chart takes its width from the page, so that one in a hidden tab has to wait until it is shown
  function drawVisible() {
    if (!window.vegaEmbed) return;
    for (const plot of document.querySelectorAll(".plot")) {
      if (plot.clientWidth > 0 && !drawn.has(plot)) drawn.set(plot, draw(plot));
    }
  }

  function setUpTabs() {
    const list = document.querySelector(".tabs");
    if (!list) return;
    const tabs = [...list.querySelectorAll("[role=tab]")];
    const panelOf = (tab) => document.getElementById(tab.getAttribute("aria-controls"));
    const select = (chosen) => {
      for (const tab of tabs) {
        tab.setAttribute("aria-selected", String(tab === chosen));
        tab.tabIndex = tab === chosen ? 0 : -1;
        panelOf(tab).hidden = tab !== chosen;
      }
      drawVisible();
    };
    const choose = (chosen) => {
      select(chosen);
      window.history.replaceState(null, "", `#${panelOf(chosen).id}`);
    };
    for (const tab of tabs) {
      panelOf(tab).setAttribute("role", "tabpanel");
      panelOf(tab).setAttribute("aria-labelledby", tab.id);
      tab.addEventListener("click", () => choose(tab));
    }
    list.addEventListener("keydown", (event) => {
      const here = tabs.indexOf(document.activeElement);
      const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (here < 0 || next === undefined) return;
      event.preventDefault();
      const tab = tabs[(next + tabs.length) % tabs.length];
      tab.focus();
      choose(tab);
    });
    list.hidden = false;
    select(tabs.find((tab) => `#${panelOf(tab).id}` === window.location.hash) ?? tabs[0]);
  }

  function sortBy(table, heading, direction) {
    const textual = heading.dataset.kind === "text";
    const sign = direction === "ascending" ? 1 : -1;
    const keyed = [...table.tBodies[0].rows].map((row) => {
      const value = row.cells[heading.cellIndex].dataset.value;
      return [value === "" ? null : textual ? value.toLowerCase() : Number(value), row];
    });
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (a < b ? -1 : Number(a > b));
    });
    table.tBodies[0].append(...keyed.map(([, row]) => row));
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", direction);
  }

  function makeSortable(table) {
    for (const heading of table.tHead.rows[0].cells) {
      if (!heading.dataset.kind) continue;
      const button = element("button", { type: "button", text: heading.textContent.trim() });
      button.title = heading.title;
      heading.removeAttribute("title");
      const [first, second] =
        heading.dataset.kind === "accuracy" ? ["descending", "ascending"] : ["ascending", "descending"];
      button.addEventListener("click", () => {
        sortBy(table, heading, heading.getAttribute("aria-sort") === first ? second : first);
      });
      heading.replaceChildren(button);
    }
    for (const cell of table.querySelectorAll("td.accuracy")) {
      if (cell.dataset.value !== "") cell.style.setProperty("--value", cell.dataset.value);
    }
  }

  function makeFilterable(panel) {
    const form = panel.querySelector(".filters");
    const rows = [...panel.querySelectorAll(".board tbody tr")];
    const apply = () => {
      const { text, method, training, flags } = Object.fromEntries(new FormData(form));
      const words = text.toLowerCase().split(/\s+/).filter(Boolean);
      const flagged = { masking: ["masking"], any: ["masking", "info"] }[flags] ?? [];
      for (const row of rows) {
        const told = row.dataset;
        row.hidden = !(
          words.every((word) => told.model.toLowerCase().includes(word)) &&
          (!method || told.method === method) &&
          (!training || told.training === training) &&
          !flagged.includes(told.severity)
        );
      }
      const shown = rows.filter((row) => !row.hidden).length;
      form.querySelector("output").textContent = `${shown} of ${rows.length} rows`;
      panel.querySelector(".nothing").hidden = shown > 0;
    };
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => window.setTimeout(apply)); // the fields are emptied after the event
    form.hidden = false;
    apply(); // a browser that goes back fills the fields in again
  }

  function flagDetails(flag) {
    return element(
      "div",
      { className: flag.severity === "masking" ? "flag masking" : "flag" },
      element("strong", { text: `${flag.name} (${flag.severity}, ${flag.value})` }),
      element("p", { text: flag.meaning }),
      element("p", { text: `What to do: ${flag.action}` }),
    );
  }

  function recordDetails(record) {
    const parts = [];
    const add = (heading, ...content) => parts.push(element("h3", { text: heading }), ...content);
    const code = (text) => element("pre", {}, element("code", { text }));
    const groups = record.groups.map((number) => data.groups[number]);
    if (record.error) add("Failed", element("p", { text: record.error }));
    for (const [heading, pairs] of groups.slice(0, 1)) add(heading, definitions(pairs));
    if (record.flags.length) add("Flags", ...record.flags.map(flagDetails));
    for (const [heading, pairs] of groups.slice(1)) add(heading, definitions(pairs));
    if (record.deviations.length) {
      const reasons = record.deviations.map((why) => element("li", { text: why }));
      add("Where the method departs from its paper", element("ul", {}, ...reasons));
    }
    if (record.command) add("Make it again", code(record.command));
    add("File", code(record.path));
    return parts;
  }

  function setUpDrawer() {
    const drawer = document.getElementById("drawer");
    const title = document.getElementById("drawer-title");
    const nameOf = (record) => [record.title, record.seed].filter(Boolean).join(", ");
    const open = (records) => {
      const single = records.length === 1;
      title.textContent = single ? nameOf(records[0]) : `${records.length} records`;
      const content = single
        ? recordDetails(records[0])
        : records.map((record) => {
            const summary = element("summary", { text: [nameOf(record), record.told].filter(Boolean).join(": ") });
            return element("details", {}, summary, ...recordDetails(record));
          });
      const body = drawer.querySelector(".body");
      body.replaceChildren(...content);
      drawer.showModal();
      body.scrollTop = 0;
    };
    document.addEventListener("click", ({ target }) => {
      const cell = target.closest("button.cell");
      if (cell) open(cell.dataset.records.split(" ").map((number) => data.records[Number(number)]));
      if (target === drawer || target.closest(".close")) drawer.close();
    });
  }

  setUpThemes();
  setUpTabs();
  for (const panel of document.querySelectorAll(".panel")) {
    makeSortable(panel.querySelector(".board"));
    makeFilterable(panel);
  }
  setUpDrawer();
  drawVisible();
  narrow.addEventListener("change", () => {
    drawn.clear();
    drawVisible();
  });
})();
